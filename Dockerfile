# docker build -t gz . && docker run --gpus all -v gz-cache:/cache -v gz-runs:/data gz train ddpm --data cifar10
FROM pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime

RUN useradd --create-home gz && mkdir /cache /data && chown gz /cache /data
WORKDIR /opt/gz
COPY pyproject.toml README.md LICENSE ./
COPY gzcli gzcli
COPY recipes recipes
RUN pip install --no-cache-dir .

# Data sets, packs and weights in /cache, runs in /data: platformdirs follows these two variables.
ENV XDG_CACHE_HOME=/cache XDG_DATA_HOME=/data
VOLUME ["/cache", "/data"]
USER gz
WORKDIR /home/gz
ENTRYPOINT ["gz"]
