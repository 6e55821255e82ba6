import json
from html.parser import HTMLParser

from tunesmith.evaluation.report import _figures, write_report


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._inside = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        self.text += "" if self._inside else data


def test_report_shows_the_verdict_first_and_needs_nothing_from_outside(run_folder):
    path = write_report(run_folder)
    page = Page(path.read_text("utf-8"))
    assert path == run_folder / "report.html"
    body = page.text[page.text.index("custom_sql ·") :]
    assert body.index("Better: SQL execution accuracy rose from") < body.index("Scores")
    assert "n=60 questions in 12 groups" in body
    assert "513 rows in = 400 trained + 50 validation + 60 held out + 3 dropped" in body
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    assert sum(tag == "script" for tag, _ in page.tags) < 12
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")


def test_report_escapes_everything_from_data(run_folder):
    html = write_report(run_folder).read_text("utf-8")
    for hostile in ("<script>alert", "<img src=x", "<b>\n", "<i>"):
        assert hostile not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "empty answer &lt;img" in html


def test_report_says_what_is_missing(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    text = Page(write_report(folder).read_text("utf-8")).text
    assert "No base and tuned model were compared" in text
    for name in ("ledger.jsonl", "recipe.yaml", "environment.json", "status.json", "events.jsonl"):
        assert name in text


def test_report_survives_damaged_files(run_folder):
    for name in ("evaluation/comparison.json", "plan.json"):
        (run_folder / name).write_text('{"comparisons": [{"metric"')
    with (run_folder / "events.jsonl").open("a") as file:
        file.write('{"kind": "ste')
    (run_folder / "evaluation" / "rows.jsonl").write_text("no row\n")
    text = Page(write_report(run_folder).read_text("utf-8")).text
    assert "plan.json is damaged" in text
    assert "1 lines of events.jsonl are damaged" in text
    assert "Line 1 of evaluation/rows.jsonl" in text


def test_curves_of_loss_rate_gradient_and_accuracy(run_folder):
    steps = [
        {"kind": "step", "step": n, "loss": 3.0 / n, "learning_rate": 1e-4 / n, "grad_norm": 0.5 * n,
         "token_accuracy": n / 10} for n in (1, 2, 3)
    ]  # fmt: skip
    validations = [{"kind": "evaluation", "step": 3, "loss": 1.5, "token_accuracy": 0.25}]
    figures = {figure["title"]: figure["data"]["traces"] for figure in _figures([], steps + validations, [])}
    assert figures.keys() == {"Loss", "Learning rate", "Gradient norm", "Token accuracy"}
    for title, key in (("Learning rate", "learning_rate"), ("Gradient norm", "grad_norm")):
        [trace] = figures[title]
        assert (trace["x"], trace["y"]) == ([1, 2, 3], [step[key] for step in steps])
    for title, key in (("Loss", "loss"), ("Token accuracy", "token_accuracy")):
        training, validation = figures[title]
        assert training["y"] == [step[key] for step in steps]
        assert (validation["x"], validation["y"]) == ([3], [validations[0][key]])
    with (run_folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in steps)
    assert "Gradient norm" in Page(write_report(run_folder).read_text("utf-8")).text


def test_every_family_of_measures_has_a_figure(run_folder):
    def event(kind, step, **measures):
        return {"kind": kind, "step": step, "loss": 0.5, "measures": measures}

    events = [
        event(
            "step", 1, **{"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/accuracies": 0.5, "kl": 0}
        ),
        event(
            "step", 2, **{"rewards/chosen": 0.2, "rewards/rejected": -0.4, "rewards/accuracies": 0.9, "kl": 1}
        ),
        event("evaluation", 2, **{"rewards/chosen": 0.15, "rewards/rejected": -0.3}),
        event("step", 3, **{"rewards/length/mean": 3.0, "rewards/length/std": 1.0}),
    ]
    figures = {f["title"]: f["data"]["traces"] for f in _figures([], events, [])}
    assert list(figures)[1:] == ["rewards", "rewards/accuracies", "kl", "rewards/length"]
    assert {t["name"]: (t["x"], t["y"]) for t in figures["rewards"]} == {
        "chosen": ([1, 2], [0.1, 0.2]),
        "rejected": ([1, 2], [-0.1, -0.4]),
        "chosen (validation)": ([2], [0.15]),
        "rejected (validation)": ([2], [-0.3]),
    }
    looks = {t["name"]: (t["role"], t["dash"]) for t in figures["rewards"]}
    assert looks["chosen"][0] == looks["chosen (validation)"][0] != looks["rejected"][0]
    assert looks["chosen"][1] != looks["chosen (validation)"][1]
    [loss] = [f for f in _figures([], events, []) if f["title"] == "Loss"]
    assert loss["data"]["layout"]["yaxis"]["title"]["text"] == "loss of the method"
    html = write_report(run_folder).read_text("utf-8")
    assert "nats per token" in html
