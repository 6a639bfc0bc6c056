"""lorl's side of `step_cpu.py`: its own Trainer on the shared prompts.

Called as SCRIPT MODEL CASE STEPS MICRO_BATCH; the last is for TRL's side, and not used here.
"""

import io
import json
import tempfile
from pathlib import Path

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
    side_arguments,
)

REWARD = """
def compute_score(solution_strs, **_):
    return [float(index % 2) for index in range(len(solution_strs))]  # the sample's index within its group, mod 2
"""


def main() -> None:
    arguments = side_arguments()
    from transformers import AutoTokenizer

    from lorl import settings, setup
    from lorl.tracking.console import Console

    prompts = make_prompts(AutoTokenizer.from_pretrained(arguments.model), PROMPT_TOKENS[arguments.case], 64)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "reward.py").write_text(REWARD)
        rows = [json.dumps({"prompt": p.text, "answer": "none"}) for p in prompts]
        (root / "train.jsonl").write_text("\n".join(rows))
        (root / "model").mkdir()
        for file in Path(arguments.model).resolve().iterdir():
            if file.name != "chat_template.jinja":  # the prompts have the right length: nothing is put around them
                (root / "model" / file.name).symlink_to(file)
        config = settings.load(
            None,
            [
                f"model.path={root / 'model'}",
                f"data.train={root / 'train.jsonl'}",
                f"data.prompts_per_step={PROMPTS_PER_STEP}",
                f"adapter.rank={RANK}",
                f"adapter.alpha={ALPHA}",
                f"rollout.n={SAMPLES}",
                f"rollout.max_response_tokens={RESPONSE_TOKENS}",
                "rollout.ignore_eos=true",
                f"reward.path={root / 'reward.py'}",
                "reward.batched=true",
                f"optim.lr={LEARNING_RATE}",
                f"optim.max_grad_norm={MAX_GRAD_NORM}",
                f"trainer.total_steps={arguments.steps}",
                "checkpoint.every_steps=null",
                f"run.dir={root / 'runs'}",
                "run.name=bench",
            ],
        )
        setup.train(config, Console(io.StringIO()))
        metrics = [json.loads(line) for line in (root / "runs/bench/metrics.jsonl").read_text().splitlines()]
        rollouts = [
            json.loads(line)
            for path in (root / "runs/bench/rollouts").glob("step-*.jsonl")
            for line in path.read_text().splitlines()
        ]
    report(
        [row["time/step_s"] for row in metrics],
        sorted({len(p.ids) for p in prompts}),
        sorted({row["tokens"] for row in rollouts}),
    )


if __name__ == "__main__":
    main()
