"""The options of `accelerate launch` that may stand after `--`: how processes find each other, what they log.

Only the options of a list are allowed, each written in full. Others name another program (`--no_python`,
`--module`, `--config_file`), start processes elsewhere (`--tpu`, `--mpirun_hostfile`), or are options of gz
under another name.
"""

from __future__ import annotations

from gzcli.core.errors import UsageError

ALLOWED = {  # option → whether a value follows
    "--debug": False,
    "--enable_cpu_affinity": False,
    "--gpu_ids": True,
    "--log_dir": True,
    "--max_restarts": True,
    "--monitor_interval": True,
    "--rdzv_backend": True,
    "--rdzv_conf": True,
    "--role": True,
    "--same_network": False,
    "--tee": True,
}
OURS = {  # option of accelerate → the option of gz for the same
    "--cpu": "--cpu",
    "--num_processes": "--gpus N`, `--cpu --processes N",
    "--multi_gpu": "--gpus all",
    "--num_machines": "--num-machines N",
    "--machine_rank": "--machine-rank R",
    "--main_process_ip": "--main-process-ip HOST",
    "--main_process_port": "--main-process-port P",
    "--mixed_precision": "--set train.precision=bf16",
    "--num_cpu_threads_per_process": "--set launch.threads=N",
    "--dynamo_backend": "--set train.compile=true",
    "--gradient_accumulation_steps": "--set train.accumulate=N",
    "--gradient_clipping": "--set train.clip=1.0",
}
# Options that cut the model into pieces, as `launch.strategy: fsdp` does. The trainer builds its optimizers
# from the parameters of the whole model, before accelerate would wrap it.
SHARDED = (
    "--use_fsdp",
    "--fsdp_",
    "--use_deepspeed",
    "--deepspeed_",
    "--zero",
    "--use_megatron_lm",
    "--megatron_lm_",
    "--use_parallelism_config",
    "--parallelism_config_",
)


def check(words: list[str]) -> list[str]:
    """The words as accelerate gets them. Raises UsageError for an option that is not allowed, and for a
    word that is no option, which accelerate would take for the program to start."""
    checked, rest = [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name not in ALLOWED:
            raise _refusal(word, name)
        if not ALLOWED[name]:
            if equals:
                raise UsageError(f"`{name}` takes no value", hint=name)
            checked.append(name)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("-"):
            raise UsageError(f"`{name}` needs a value", hint="`accelerate launch --help` tells which")
        checked += [name, value]
    return checked


def _refusal(word: str, name: str) -> UsageError:
    if name.startswith(SHARDED):
        return UsageError(
            f"`{word}`: how a model is shared out over GPUs stands in its recipe",
            hint="`--set launch.strategy=fsdp` shares out its weights; what also saves memory: "
            "`--set train.accumulate=2`, `--set optim.name=adamw8bit`",
        )
    if not word.startswith("-"):
        message = f"`{word}` is no option of `accelerate launch`"
        return UsageError(message, hint="only options and their values stand after `--`")
    hint = f"gz has its own: `{OURS[name]}`" if name in OURS else f"these are: {' '.join(ALLOWED)}"
    return UsageError(f"`{word}` is not passed on to `accelerate launch`", hint=hint)
