import json
import re
from html.parser import HTMLParser

import pytest
from synthetic_run import make_run_folder

from lorl.errors import UserError
from lorl.tracking.charts import charts
from lorl.tracking.jsonl import read_metrics
from lorl.tracking.report import write_report
from lorl.tracking.rollouts import choose_prompts, read_rollouts, spread

pytest.importorskip("plotly")


class Page(HTMLParser):
    """The elements and the readable text of a page, scripts and styles left out of the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self._text, self._inside = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self._text.append(data)


def figures(html):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)[1])


def titles(html):
    return re.findall(r"<figcaption><b>(.*?)</b>", html)


def test_a_finished_run_shows_what_was_run_and_what_came_of_it(tmp_path):
    html = write_report(make_run_folder(tmp_path / "sort-42")).read_text()
    text = Page(html).text
    for part in (
        "sort-42",
        "finished after 40 steps",
        "smollm2-135m",
        "rank 32, alpha 32, all-linear",
        "grpo, ppo_clip, KL 0 in the loss",
        "reasoning_gym:number_sorting",
        "0:07:21",
        "x86_64, 2 CPUs, 23.5 GiB of memory",
        "27.3%",  # 70 of 256
        "95% interval 22.2% to 33.1%, n = 256",
        "96.1%",
        "+68.8 points of accuracy",
        "99.6% well-formed answers",
        "max_response_tokens: 512",
    ):
        assert part in text
    assert titles(html) == [
        "Reward",
        "Accuracy on held-out problems",
        "KL to the reference",
        "Entropy",
        "Response length",
        "Truncated and graded",
        "Mismatch, engine to trainer",
        "Clip fraction",
        "Gradient norm",
        "Loss",
        "Throughput",
        "Memory",
        "Other rewards",
        "Seconds a step, by phase",
        "Outcomes that are not ok",
    ]


def test_the_curves_hold_the_logged_numbers_and_a_gap_where_one_was_not_finite(tmp_path):
    run = make_run_folder(tmp_path / "run")
    html = write_report(run).read_text()
    drawn = dict(zip(titles(html), figures(html), strict=True))
    rows = read_metrics(run)
    (kl,) = drawn["KL to the reference"]["data"]
    assert (kl["x"], kl["y"]) == (list(range(1, 41)), [row["policy/kl"] for row in rows[1:]])
    (norm,) = drawn["Gradient norm"]["data"]
    assert norm["y"][8] is None
    accuracy = drawn["Accuracy on held-out problems"]["data"][0]
    assert accuracy["x"] == list(range(0, 41, 5))
    low = [y - down for y, down in zip(accuracy["y"], accuracy["error_y"]["arrayminus"], strict=True)]
    assert low == pytest.approx([row["eval/accuracy_low"] for row in rows if "eval/accuracy" in row])
    stacked = drawn["Seconds a step, by phase"]
    assert stacked["layout"]["barmode"] == "stack"
    totals = [sum(parts) for parts in zip(*(trace["y"] for trace in stacked["data"]), strict=True)]
    assert totals == pytest.approx([row["time/step_s"] for row in rows[1:]])


def test_a_mismatch_that_jumps_is_drawn_on_a_logarithmic_axis():
    calm = [{"step": step, "rollout/mismatch": 1e-6, "policy/kl": 1e-6} for step in range(5)]
    jump = [*calm, {"step": 5, "rollout/mismatch": 0.1, "policy/kl": 0.1}]
    axes = [[chart.figure["layout"]["yaxis"].get("type") for chart in charts(rows, {})] for rows in (calm, jump)]
    assert axes == [[None, None], [None, "log"]]


CRITIC = {
    "critic/loss": 0.1,
    "critic/explained_variance": 0.5,
    "critic/returns_mean": 0.4,
    "critic/values_mean": 0.3,
    "critic/grad_norm": 2.0,
}
CORRECTION = {
    "rollout_corr/kl": 0.01,
    "rollout_corr/k3_kl": 0.02,
    "rollout_corr/ppl_ratio": 1.01,
    "rollout_corr/chi2_token": 0.03,
    "rollout_corr/chi2_seq": 0.3,
    "rollout_corr/rollout_is_mean": 1.0,
    "rollout_corr/rollout_is_max": 1.9,
    "rollout_corr/rollout_is_min": 0.4,
    "rollout_corr/rollout_is_eff_sample_size": 0.97,
    "rollout_corr/rollout_rs_masked_fraction": 0.05,
}


@pytest.mark.parametrize("metrics", [CRITIC, CORRECTION])
def test_the_critic_and_rollout_correction_are_drawn_where_a_run_has_them(metrics):
    plain = [{"step": step, "reward/mean": 0.1 * step} for step in (1, 2, 3)]
    drawn = charts([row | {name: value * row["step"] for name, value in metrics.items()} for row in plain], {})
    values = [trace["y"] for chart in drawn for trace in chart.figure["data"]]
    for name, value in metrics.items():
        assert [value * step for step in (1, 2, 3)] in values, name
    assert len(drawn) > len(charts(plain, {}))


def test_plotly_accepts_every_figure(tmp_path):
    import plotly.graph_objects as go

    run = make_run_folder(tmp_path / "run")
    figures = [go.Figure(chart.figure) for chart in charts(read_metrics(run), read_rollouts(run).failures)]
    assert len(figures) > 3  # each would have raised on a property that plotly does not know
    assert all(figure.data for figure in figures)


def test_an_unfinished_run_of_a_few_steps_has_a_report_too(tmp_path):
    run = make_run_folder(tmp_path / "young", steps=2, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    text = Page(write_report(run).read_text()).text
    assert "unfinished: step 2 of 40" in text
    assert "Before" in text
    assert "After" not in text


def test_metrics_alone_are_enough(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    html = write_report(tmp_path / "bare", tmp_path / "out" / "r.html").read_text()
    assert titles(html) == ["Reward"]
    assert "unfinished: step 1" in Page(html).text


def test_what_a_model_wrote_cannot_leave_its_place(tmp_path):
    attack = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)><!--\ud800 {{ 7 * 7 }}"
    run = make_run_folder(tmp_path / "run", steps=2)
    row = json.loads((run / "rollouts" / "step-1.jsonl").read_text().splitlines()[0])
    row |= {"prompt": attack, "completion": attack, "ground_truth": attack, "prompt_id": attack, "status": attack}
    row["extras"] = {attack: attack}
    (run / "rollouts" / "step-1.jsonl").write_text(json.dumps(row) + "\n")
    (run / "config.yaml").write_text(f"model: {{path: {json.dumps(attack)}}}\n")
    summary = json.loads((run / "summary.json").read_text()) | {"run": attack, "model": attack}
    (run / "summary.json").write_text(json.dumps(summary))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, f"reward/{attack}": 1.0}) + "\n")

    html = write_report(run).read_text()
    page = Page(html)
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert "onerror" not in page.attributes
    assert "<script>alert(1)</script>" in page.text  # shown, as text
    assert "{{ 7 * 7 }}" in page.text
    assert "<" not in re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)[1]


def test_the_page_needs_no_network_and_fits_in_an_email(tmp_path):
    html = write_report(make_run_folder(tmp_path / "run", steps=3)).read_text()
    own = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", own)
    (nonce,) = set(re.findall(r'nonce="(.*?)"', html))
    assert f"default-src 'none'; script-src 'nonce-{nonce}'" in html
    assert len(html) < 6e6


def test_completions_of_one_prompt_are_shown_as_training_changes_them(tmp_path):
    run = make_run_folder(tmp_path / "run")
    card = read_rollouts(run).cards[0]
    assert card.prompt_id == "train-0"
    assert [moment.step for moment in card.moments] == [1, 11, 21, 30, 40]
    assert [sample["sample"] for sample in card.moments[0].samples] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in (run / "rollouts" / "step-11.jsonl").read_text().splitlines()]
    rewards = [r["reward"] for r in lines if r["prompt_id"] == "train-0" and r["reward"] is not None]
    assert card.moments[1].mean_reward == pytest.approx(sum(rewards) / len(rewards))
    text = Page(write_report(run).read_text()).text
    assert text.index("Step 1 mean reward") < text.index("Step 40 mean reward")
    assert card.moments[-1].samples[0]["completion"] in text


def test_prompts_seen_once_are_taken_from_all_over_training():
    assert choose_prompts({f"p{step}": {step} for step in range(100)}, count=3) == ["p0", "p50", "p99"]
    assert choose_prompts({"once": {1}, "twice": {2, 9}, "thrice": {1, 5, 9}}, count=2) == ["thrice", "twice"]
    assert choose_prompts({"once": {1}, "twice": {2, 9}}, count=5) == ["twice", "once"]
    assert choose_prompts({}) == []


def test_spread_keeps_both_ends_and_never_repeats():
    for size in range(12):
        for count in range(14):
            chosen = spread(list(range(size)), count)
            assert len(chosen) == len(set(chosen)) == min(size, count)
            if count >= 2 and size >= 2:
                assert (chosen[0], chosen[-1]) == (0, size - 1)


def test_ungraded_outcomes_are_counted_by_kind_and_step(tmp_path):
    run = make_run_folder(tmp_path / "run", steps=1)
    rows = [{"prompt_id": "p", "status": status} for status in ("ok", "timeout", "timeout", "lost")]
    (run / "rollouts" / "step-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(run).read_text()
    assert "Of 4 samples, these were not graded: 1 lost, 2 timeout." in Page(html).text
    drawn = dict(zip(titles(html), figures(html), strict=True))["Outcomes that are not ok"]["data"]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in drawn] == [("lost", [1], [1]), ("timeout", [1], [2])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no run folder at"),
        (lambda folder: folder.mkdir(), "holds no step yet"),
    ],
)
def test_a_folder_without_a_run_is_refused_in_one_sentence(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / "run")


def test_an_output_that_cannot_be_written_is_refused_in_one_sentence(tmp_path):
    run = make_run_folder(tmp_path / "run", steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report to"):
        write_report(run, tmp_path / "file" / "report.html")


def test_without_plotly_the_command_that_brings_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"pip install 'lorl\[report\]'"):
        write_report(make_run_folder(tmp_path / "run", steps=1))
