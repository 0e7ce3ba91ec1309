# docker build -t gz .                     for GPUs: docker run --gpus all …
# docker build -t gz --target cpu --build-arg INDEX=URL .
#                                          for laptops and CI; URL: the index of torch's CPU wheels, which
#                                          pytorch.org names
# docker run -v gz-cache:/cache -v gz-runs:/data gz train vae
# docker run --network host … gz demo --no-browser        it serves its own machine alone
ARG PYTHON=3.11

# lock.txt pins every package, with its checksums, for Python 3.11 on Linux x86-64: `make lock`
FROM python:${PYTHON}-slim AS base
RUN useradd --create-home gz && mkdir /cache /data && chown gz:gz /cache /data
# Data sets, packs and weights in /cache, runs in /data: platformdirs follows these two variables.
ENV XDG_CACHE_HOME=/cache XDG_DATA_HOME=/data PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /opt/gz
COPY pyproject.toml README.md LICENSE .ci/lock.txt ./
COPY gzcli gzcli
COPY recipes recipes
VOLUME ["/cache", "/data"]
ENTRYPOINT ["gz"]
CMD ["--help"]

FROM base AS cpu
ARG INDEX
RUN pip install --require-hashes --no-deps --extra-index-url "${INDEX:?the index of CPU wheels of torch}" -r lock.txt \
 && pip install --no-deps .
USER gz
WORKDIR /home/gz

# The last stage is what a plain `docker build` makes. The wheels of torch bring CUDA's libraries with them.
FROM base AS cuda
# These are not in the lock; the versions are.
RUN pip install $(sed -nE 's/^(torch(vision)?==[^+ ]+).*/\1/p' lock.txt) \
 && grep -vE '^torch(vision)?==' lock.txt > rest.txt \
 && pip install --require-hashes --no-deps -r rest.txt && pip install --no-deps .
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER gz
WORKDIR /home/gz
