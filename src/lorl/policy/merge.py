"""Folding an adapter into its base, for tools that know nothing of adapters."""

import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lorl.config import ModelConfig
from lorl.errors import UserError
from lorl.policy import adapters
from lorl.policy.fetch import resolve
from lorl.policy.load import load_tokenizer


def merge(base: str, adapter: Path, output: Path) -> None:
    """Writes `base` with `adapter` folded in to the new folder `output`, tokenizer included.

    W + scaling * B A is computed in float32 and rounded once to the base's own dtype.

    Raises:
        UserError: `output` exists or cannot be written, or base and adapter don't fit each other. Nothing is left.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder for the merged model.")
    config, tensors = adapters.read_config(adapter), adapters.read_tensors(adapter)
    path = resolve(base)
    tokenizer = load_tokenizer(ModelConfig(path=base))
    own_dtype = AutoConfig.from_pretrained(path).dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel(model, config, adapter_name="merged")
    adapters.load_tensors(model, "merged", tensors, str(adapter))
    merged = model.merge_and_unload(safe_merge=True)
    work = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        merged.to(own_dtype).save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.rename(output)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
