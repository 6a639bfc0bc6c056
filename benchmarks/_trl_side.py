"""TRL's side of `step_cpu.py`: the fastest plain settings that TRL has on a CPU. Run by TRL's interpreter."""

import time

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from _step_case import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PROMPT_TOKENS,
    PROMPTS_PER_STEP,
    RANK,
    RESPONSE_TOKENS,
    SAMPLES,
    make_prompts,
    report,
    reward,
    side_arguments,
)


class StepClock(TrainerCallback):
    """Wall time from the end of one optimizer step to the end of the next; insists on a gradient in each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_, **__) -> None:
        self.last = time.perf_counter()

    def on_pre_optimizer_step(self, *_, model, **__) -> None:
        last_lora_b = [parameter for name, parameter in model.named_parameters() if "lora_B" in name][-1]
        if not last_lora_b.grad.any():
            raise RuntimeError("a step without gradient: the comparison would be of unequal work")

    def on_step_end(self, *_, **__) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def config(steps: int, micro_batch: int) -> GRPOConfig:
    return GRPOConfig(
        output_dir="/tmp/lorl-bench-trl",  # named because TRL asks for one; nothing is saved
        max_steps=steps,
        # All completions are sampled in one pass and trained on in passes of `micro_batch`.
        # Old log-probabilities are not recomputed, as generation and step are aligned.
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS_PER_STEP * SAMPLES // micro_batch,
        steps_per_generation=PROMPTS_PER_STEP * SAMPLES // micro_batch,
        num_generations=SAMPLES,
        num_iterations=1,
        beta=0.0,
        max_completion_length=RESPONSE_TOKENS,
        generation_kwargs={"min_new_tokens": RESPONSE_TOKENS},
        pad_to_multiple_of=None,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        shuffle_dataset=False,
        model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"},
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def main() -> None:
    arguments = side_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = make_prompts(tokenizer, PROMPT_TOKENS[arguments.case], PROMPTS_PER_STEP * arguments.steps)
    lengths: set[int] = set()

    def rewards(completion_ids: list[list[int]], **_) -> list[float]:
        lengths.update(map(len, completion_ids))
        return [reward(index % SAMPLES) for index in range(len(completion_ids))]

    clock = StepClock()
    trainer = GRPOTrainer(
        model=arguments.model,
        reward_funcs=rewards,
        args=config(arguments.steps, arguments.micro_batch),
        train_dataset=Dataset.from_list([{"prompt": prompt.text} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    report(clock.seconds, sorted({len(prompt.ids) for prompt in prompts}), sorted(lengths))


if __name__ == "__main__":
    main()
