"""The keys of verl that say only together what is trained, on what, and where its results go.

Each function gives lorl's keys for one such group, as in `lorl.verl.objective`.
"""

from collections.abc import Callable
from os.path import expanduser
from pathlib import Path

from lorl.errors import UserError
from lorl.verl.rollout_rows import ONLY_VLLM
from lorl.verl.values import Lorl, Values

_ACTOR = "actor_rollout_ref.actor"
_MODEL = "actor_rollout_ref.model"
_ROLLOUT = "actor_rollout_ref.rollout"


def model_and_adapter(values: Values) -> Lorl:
    found: Lorl = {"model.path": expanduser(values[f"{_MODEL}.path"])}
    rank, start = values[f"{_MODEL}.lora_rank"], values[f"{_MODEL}.lora_adapter_path"]
    shape = [f"{_MODEL}.{name}" for name in ("lora_rank", "lora_alpha", "target_modules", "exclude_modules")]
    if start is not None:
        values.idle("rank, alpha and targets are those of the adapter in lora_adapter_path", *shape)
        if values[f"{_ACTOR}.use_kl_loss"] or values["algorithm.use_kl_in_reward"]:
            values.note(
                "the KL's reference is the adapter that training starts from; verl takes the base "
                "(+lorl.algorithm.reference=base does too)"
            )
        return found | {"adapter.path": expanduser(start)}
    if rank == 0:
        values.fail(
            f"{_MODEL}.lora_rank",
            f"0 is full fine-tuning, and lorl trains adapters; set {_MODEL}.lora_rank=32, or "
            f"{_MODEL}.lora_adapter_path to start from one",
        )
    names = ("rank", "alpha", "target_modules", "exclude_modules")
    return found | {f"adapter.{name}": values[key] for name, key in zip(names, shape, strict=True)}


def files(values: Values) -> Lorl:
    def at_expanduser(paths: str | list[str] | None) -> str | list[str] | None:
        return [expanduser(path) for path in paths] if isinstance(paths, list) else paths and expanduser(paths)

    skip, cut = values["data.filter_overlong_prompts"], values["data.truncation"]
    if cut == "middle" and not skip:
        values.fail("data.truncation", "lorl cuts prompts at one end; use left or right")
    if skip and cut != "error":
        values.idle("filter_overlong_prompts leaves none to cut", "data.truncation")
    overlong = "skip" if skip else {"error": "error", "left": "truncate_left", "right": "truncate_right"}[cut]
    return {
        "data.train": at_expanduser(values["data.train_files"]),
        "data.val": at_expanduser(values["data.val_files"]),
        "data.overlong": overlong,
    }


def lengths(values: Values) -> Lorl:
    """Nothing but checks: lorl has one length of prompts and one of responses."""
    prompt, response = values["data.max_prompt_length"], values["data.max_response_length"]
    for key, length, source in (
        (f"{_ROLLOUT}.prompt_length", prompt, "data.max_prompt_length"),
        (f"{_ROLLOUT}.response_length", response, "data.max_response_length"),
        ("reward.reward_kwargs.max_resp_len", response, "data.max_response_length"),
    ):
        if values[key] not in (None, length):
            values.fail(key, f"must be {values.spelled(source)}")
    model = f"{_ROLLOUT}.max_model_len"
    if values.has(model) and values[model] is not None:
        if values[model] < prompt + response:
            needed = f"data.max_prompt_length + data.max_response_length = {prompt + response}"
            values.fail(model, f"shorter than {needed}; raise it, or lower one of them")
        values.idle("the engine's longest sequence is a prompt and a response", model)
    return {}


def devices(values: Values) -> Lorl:
    gpus, nodes = values["trainer.n_gpus_per_node"], values["trainer.nnodes"]
    ways, sequence = f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ACTOR}.ulysses_sequence_parallel_size"
    for key in (ways, sequence):
        if values.has(key) and (gpus * nodes) % values[key]:
            values.fail(key, f"does not divide the {gpus * nodes} GPUs of {values.spelled('trainer.n_gpus_per_node')}")
    values.idle("lorl lays out the base and the engine over the GPUs by itself", ways)
    found: Lorl = {"parallel.gpus": gpus, "parallel.nodes": nodes, "parallel.sequence": values[sequence]}
    tokens = f"{_ACTOR}.ppo_max_token_len_per_gpu"
    if values[f"{_ACTOR}.use_dynamic_bsz"]:
        return found | {"parallel.microbatch_tokens": values[tokens]}
    values.idle(f"{_ACTOR}.use_dynamic_bsz is False", tokens)
    return found


def engine(values: Values) -> Lorl:
    """A script written for vLLM runs where there is none as well: `auto` is then the embedded engine."""
    name, memory = f"{_ROLLOUT}.name", f"{_ROLLOUT}.gpu_memory_utilization"
    if values.has(memory):
        values.note(
            f"{values.spelled(memory)}: rollout.memory_fraction={values[memory]}, for the KV cache alone; verl's "
            "counts the engine's weights too, which here are the trainer's"
        )
    chosen = {None: "auto", "hf": "torch", "vllm": "vllm"}[values[name]]
    if chosen == "vllm" and (lack := _lacks_vllm(values[f"{_ACTOR}.ulysses_sequence_parallel_size"])):
        values.note(f"{values.spelled(name)}: rollout.engine=auto, since {lack}")
        chosen = "auto"
    if chosen == "torch" or (chosen == "auto" and values[name]):
        values.idle(
            ONLY_VLLM,
            f"{_ROLLOUT}.max_num_batched_tokens",
            f"{_ROLLOUT}.enable_prefix_caching",
            f"{_ROLLOUT}.enforce_eager",
            f"{_ROLLOUT}.free_cache_engine",
            f"{_ROLLOUT}.engine_kwargs.vllm.max_loras",
        )
    return {"rollout.engine": chosen}


def _lacks_vllm(sequence: int) -> str | None:
    """Why vLLM cannot be the engine here; None: it can."""
    from lorl.rollout.vllm import versions

    if sequence > 1:
        return f"{sequence} ranks split each pass, and lorl's vLLM engine proves its answers rank by rank"
    try:
        versions.check()
    except UserError:
        version = versions.installed()
        known = f"lorl knows {versions.SUPPORTED}"
        return f"vLLM {version} is installed and {known}" if version else f"vLLM is not installed ({known})"
    return None


def validation(values: Values) -> Lorl:
    """verl's do_sample=False is greedy, whatever the temperature says."""
    sample, temperature, n = (f"{_ROLLOUT}.val_kwargs.{name}" for name in ("do_sample", "temperature", "n"))
    if values[temperature] > 0 and not values[sample]:
        if values.has(sample):
            values.fail(temperature, f"{values.spelled(sample)} answers greedily; drop one of them")
        values.note(f"{values.spelled(temperature)} samples in validation, as if do_sample=True stood beside it")
    if values[n] > 1 and values[temperature] == 0:
        values.fail(n, f"greedy answers are all equal; set {temperature} above 0 and {sample}=True")
    return {"eval.n": values[n], "eval.temperature": float(values[temperature])}


def seed(values: Values) -> Lorl:
    ours, engines = values["data.seed"], values[f"{_ROLLOUT}.seed"]
    if ours is not None and engines is not None and ours != engines:
        values.idle("data.seed rules every draw", f"{_ROLLOUT}.seed")
    chosen = ours if ours is not None else engines
    return {} if chosen is None else {"seed": chosen}


def trackers(values: Values) -> Lorl:
    if not values.has("trainer.logger"):
        return {}
    named = values["trainer.logger"]
    named = [named] if isinstance(named, str) else named
    known = ("console", "file", "tensorboard", "wandb", "trackio", "mlflow")
    for name in named:
        if name not in known:
            values.fail("trainer.logger", f"lorl has no logger {name!r}; use {', '.join(known)}")
    return {"trainer.trackers": [name for name in named if name not in ("console", "file")]}


def run_folder(values: Values) -> Lorl:
    """checkpoints/PROJECT/EXPERIMENT is the run's folder, as it is verl's."""
    local = "trainer.default_local_dir"
    if values.has(local):
        folder = Path(expanduser(values[local]))
        parent, name = str(folder.parent), folder.name
        if values["trainer.experiment_name"] != name:
            values.idle(f"{local} names the run", "trainer.experiment_name")
    else:
        parent, name = f"checkpoints/{values['trainer.project_name']}", values["trainer.experiment_name"]
    source = local if values.has(local) else "trainer.experiment_name"
    if not name or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name) or not name[0].isalnum():
        values.fail(source, "names the run's folder: letters, digits, '.', '_' and '-', the first no sign")
    if len(name) > 64:
        values.fail(source, f"names the run's folder, with at most 64 characters, not {len(name)}")
    return {"run.dir": parent, "run.name": name, "run.project": values["trainer.project_name"]}


def resume(values: Values) -> Lorl:
    mode, path = values["trainer.resume_mode"], "trainer.resume_from_path"
    if mode != "resume_path":
        if values[path] is not None:
            values.fail(path, f"has no effect with {values.spelled('trainer.resume_mode')}; use resume_path")
        return {"resume": "never" if mode == "disable" else "auto"}
    if values[path] is None:
        values.fail("trainer.resume_mode", f"set {path} too, to a step's folder")
    return {"resume": expanduser(values[path])}


def checkpoints(values: Values) -> Lorl:
    actor, critic = (f"trainer.max_{who}_ckpt_to_keep" for who in ("actor", "critic"))
    if values.has(critic) and values[critic] != values[actor]:
        values.fail(critic, f"a checkpoint holds actor and critic; it must be {values.spelled(actor)}")
    return {"checkpoint.keep": values[actor]}


GROUPS: tuple[Callable[[Values], Lorl], ...] = (
    model_and_adapter,
    files,
    lengths,
    devices,
    engine,
    validation,
    seed,
    trackers,
    run_folder,
    resume,
    checkpoints,
)
