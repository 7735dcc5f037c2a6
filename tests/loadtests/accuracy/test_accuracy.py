"""Accuracy over HTTP: known answers give known figures, and nothing that fails is left out."""

from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from tests.loadtests.accuracy.fakes import (
    CLASSES,
    TEN,
    Answers,
    Fake,
    asking,
    images_of,
    predicted,
    results_in,
    rows_in,
)
from tests.processes import post, serving
from training.__main__ import app as training


def test_known_answers_give_known_accuracy_and_the_list_of_what_is_wrong(fake: Fake, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", TEN)
    ended = asking(data, tmp_path / "out", "--url", fake.url)
    assert ended.exit_code == 0, ended.output
    (model,) = results_in(tmp_path / "out")["models"]
    assert (model["model"], model["version"], model["failed"], model["manifest"]) == ("right", 3, 0, None)
    assert (model["top1"]["hits"], model["top1"]["of"], model["top1"]["share"]) == (6, 10, 0.6)
    assert model["top5"]["hits"] == 8
    wrong = rows_in(tmp_path / "out" / "disagreements.csv")
    assert [(row["name"], row["label"], row["right class"]) for row in wrong] == [
        ("06.png", "cat", "dog"),
        ("07.png", "dog", "ant"),
        ("08.png", "elk", "ant"),
        ("09.png", "elk", "ant"),
    ]
    assert wrong[0]["right probability"] == "0.900000"
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| right | 3 | 10 | 60.00 (31.27–83.18) | 80.00 (49.02–94.33) | 0 | nothing to compare with |" in page
    assert "```sh\nas typed\n```" in page
    assert "60.00 (31.27–83.18)" in ended.output
    assert Counter(image for _, _, image in fake.asked).most_common(1)[0][1] == 1
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_labels_that_are_indices_are_compared_with_indices(fake: Fake, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", [(str(CLASSES.index(label)), content) for label, content in TEN])
    asking(data, tmp_path / "out", "--url", fake.url)
    (model,) = results_in(tmp_path / "out")["models"]
    assert (model["top1"]["hits"], model["top5"]["hits"]) == (6, 8)
    assert "| 07.png | dog | ant 90% |" in (tmp_path / "out" / "report.md").read_text()


def test_two_models_are_compared_image_by_image(fake: Fake, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", TEN)
    ended = asking(data, tmp_path / "out", "--url", fake.url, "--reference", "left")
    assert ended.exit_code == 0, ended.output
    found = results_in(tmp_path / "out")
    assert [model["top1"]["hits"] for model in found["models"]] == [6, 5]
    pair = found["reference"]
    assert (pair["same_class"]["hits"], pair["same_class"]["of"]) == (6, 10)
    assert (pair["only_model_right"], pair["only_reference_right"], pair["labelled"]) == (2, 1, 10)
    assert (pair["points"], pair["p_value"]) == (10, 1)
    differing = rows_in(tmp_path / "out" / "disagreements.csv")
    assert [row["name"] for row in differing] == ["04.png", "05.png", "06.png", "07.png"]
    assert (differing[0]["right class"], differing[0]["left class"]) == ("bee", "ant")
    assert "right and left give the same class for 6 of 10 images" in ended.output
    assert "no difference seen (exact McNemar test, p = 1.0000)" in ended.output
    assert "training with another seed may change it by as much" in ended.output
    assert Counter(model for _, model, _ in fake.asked) == {"right": 10, "left": 10}


def test_a_difference_beyond_chance_is_reported(fake: Fake, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", [("ant", "right=bee;left=ant")] * 12)
    ended = asking(data, tmp_path / "out", "--url", fake.url, "--reference", "left")
    assert results_in(tmp_path / "out")["reference"]["p_value"] == 2 / 2**12
    assert "-100.00 points of top-1 for right" in ended.output
    assert "left is better" in ended.output


def test_unlabelled_images_are_left_out_unless_two_models_are_compared(fake: Fake, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", [*TEN[:2], ("", "right=ant;left=bee")])
    ended = asking(data, tmp_path / "one", "--url", fake.url)
    assert len(fake.asked) == 2
    assert "1 images have no label and were left out" in ended.output
    asking(data, tmp_path / "two", "--url", fake.url, "--reference", "left")
    found = results_in(tmp_path / "two")
    assert (found["models"][0]["sent"], found["models"][0]["top1"]["of"]) == (3, 2)
    assert (found["reference"]["same_class"]["hits"], found["reference"]["labelled"]) == (2, 2)
    (data / "labels.csv").unlink()
    ended = asking(data, tmp_path / "none", "--url", fake.url)
    assert ended.exit_code == 1
    assert "holds no labels: it needs a labels.csv, class folders" in ended.output
    ended = asking(data, tmp_path / "pair", "--url", fake.url, "--reference", "left")
    assert ended.exit_code == 0, ended.output
    assert "give the same class for 2 of 3" in ended.output


def stated(*, top1: float, n: int) -> dict[str, Any]:
    return {"dataset": "animals", "split": "test", "n": n, "top1": top1, "top5": 0.8}


def test_the_manifest_s_accuracy_must_be_met_on_the_same_images(fake: Fake, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", TEN)
    fake.stated["right"] = stated(top1=0.6, n=10)
    ended = asking(data, tmp_path / "out", "--url", fake.url)
    assert ended.exit_code == 0
    assert "60.00 of 10 (animals test): the same" in (tmp_path / "out" / "report.md").read_text()
    fake.stated["right"] = stated(top1=0.8, n=10)
    ended = asking(data, tmp_path / "out", "--url", fake.url)
    assert ended.exit_code == 1
    assert "(animals test): DIFFERS, -2 images here (-20.00 points)" in (tmp_path / "out" / "report.md").read_text()
    check = results_in(tmp_path / "out")["models"][0]["manifest"]
    assert (check["same_images"], check["images_more_here"], check["holds"]) == (True, -2, False)
    ended = asking(data, tmp_path / "out", "--url", fake.url, "--max-drop-points", "20")
    assert ended.exit_code == 0
    assert "(animals test): -2 images here (-20.00 points)" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(("top1", "where"), [(0.8, "inside"), (0.9, "OUTSIDE")])
def test_on_other_images_the_manifest_s_accuracy_is_held_against_the_interval(
    top1: float, where: str, fake: Fake, tmp_path: Path
) -> None:
    fake.stated["right"] = stated(top1=top1, n=10_000)
    ended = asking(images_of(tmp_path / "data", TEN), tmp_path / "out", "--url", fake.url)
    assert ended.exit_code == 0
    assert f"of 10,000 (animals test): {where} the interval" in (tmp_path / "out" / "report.md").read_text()


def test_limit_sends_only_the_first_images(fake: Fake, tmp_path: Path) -> None:
    fake.stated["right"] = stated(top1=0.5, n=3)
    ended = asking(images_of(tmp_path / "data", TEN), tmp_path / "out", "--url", fake.url, "--limit", "3")
    assert sorted(image.partition("#")[2] for _, _, image in fake.asked) == ["0", "1", "2"]
    assert "--limit left out its last 7 images" in ended.output
    # As many as in the manifest, yet not the same.
    assert not results_in(tmp_path / "out")["models"][0]["manifest"]["same_images"]
    assert ended.exit_code == 0


def test_a_failed_request_counts_as_wrong_and_is_listed(fake: Fake, tmp_path: Path) -> None:
    def answer(model: str, image: str, _: int) -> Answers:
        if image.endswith("#0"):
            return 500, {}, {"detail": "it broke"}
        if image.endswith("#1"):
            return 200, {}, {"results": []}
        return predicted(model, image)

    fake.answer = answer
    data = images_of(tmp_path / "data", TEN)
    ended = asking(data, tmp_path / "out", "--url", fake.url)
    (model,) = results_in(tmp_path / "out")["models"]
    assert (model["top1"]["hits"], model["top1"]["of"], model["failed"]) == (4, 10, 2)
    assert "2 requests failed: they count as wrong answers" in ended.output
    first, second = rows_in(tmp_path / "out" / "failures.csv")
    assert (first["name"], first["model"], first["failure"]) == ("00.png", "right", '500: {"detail": "it broke"}')
    assert "200, but not understood" in second["failure"]
    assert "00.png" in [row["name"] for row in rows_in(tmp_path / "out" / "disagreements.csv")]
    # Both fail, and so give no class at all: no agreement.
    asking(data, tmp_path / "out", "--url", fake.url, "--reference", "left")
    assert results_in(tmp_path / "out")["reference"]["same_class"]["hits"] == 4
    fake.answer = lambda model, image, _: predicted(model, image)
    asking(data, tmp_path / "out", "--url", fake.url)
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_a_refused_request_is_sent_again_after_the_time_that_the_server_asks_for(fake: Fake, tmp_path: Path) -> None:
    def answer(model: str, image: str, earlier: int) -> Answers:
        if image.endswith("#3") and earlier == 0:
            return 429, {"Retry-After": "1"}, {}
        return predicted(model, image)

    fake.answer = answer
    ended = asking(images_of(tmp_path / "data", TEN), tmp_path / "out", "--url", fake.url)
    found = results_in(tmp_path / "out")
    assert [found["models"][0][name] for name in ("failed", "retries", "sent")] == [0, 1, 10]
    assert found["models"][0]["top1"]["hits"] == 6
    assert "1 retries after 429" in ended.output
    refused, again = (at for at, _, image in fake.asked if image.endswith("#3"))
    assert again - refused >= 1


@pytest.mark.parametrize(("pause", "times"), [("0", 8), ("3600", 1)])
def test_a_server_that_always_refuses_is_not_asked_for_ever(pause: str, times: int, fake: Fake, tmp_path: Path) -> None:
    fake.answer = lambda *_: (429, {"Retry-After": pause}, {})
    asking(images_of(tmp_path / "data", TEN[:2]), tmp_path / "out", "--url", fake.url)
    assert len(fake.asked) == 2 * times
    failures = rows_in(tmp_path / "out" / "failures.csv")
    assert [row["failure"] for row in failures] == [f"429 {times} times, the last with Retry-After {pause} s"] * 2


def test_a_server_that_dies_ends_the_run_early_and_the_report_says_so(fake: Fake, tmp_path: Path) -> None:
    def answer(model: str, image: str, _: int) -> Answers:
        if len(fake.asked) > 20:
            raise ConnectionResetError
        return predicted(model, image)

    fake.answer = answer
    data = images_of(tmp_path / "data", TEN[:1] * 90)
    ended = asking(data, tmp_path / "out", "--url", fake.url, "--connections", "1")
    assert ended.exit_code == 1
    found = results_in(tmp_path / "out")
    assert found["ended_early"].startswith("the server is gone (no answer: ")
    assert found["models"][0]["top1"]["hits"] == 20
    assert found["models"][0]["failed"] == 3
    assert "23 of 90 images were sent to right" in ended.output


def test_connections_that_fail_now_and_then_do_not_end_the_run(fake: Fake, tmp_path: Path) -> None:
    def answer(model: str, image: str, _: int) -> Answers:
        if len(fake.asked) % 3 == 0:
            raise ConnectionResetError
        return predicted(model, image)

    fake.answer = answer
    data = images_of(tmp_path / "data", TEN[:1] * 30)
    asking(data, tmp_path / "out", "--url", fake.url, "--connections", "1")
    found = results_in(tmp_path / "out")
    assert (found["ended_early"], found["models"][0]["sent"], found["models"][0]["failed"]) == (None, 30, 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "wrong"], "no model 'wrong' here; there are: left, right"),
        (["--reference", "wrong"], "no model 'wrong' here; there are: left, right"),
        (["--model", "right?x"], "settings are written MODEL?NAME=VALUE"),
        (["--model", "right?x=1"], "--url goes with models by their names alone"),
        (["--reference", "right"], "--reference right is the model itself"),
        (["--repository", "models"], "--url names a server that runs already"),
        (["--url", "127.0.0.1:8000"], "give the address of a running service, such as http://127.0.0.1:8000"),
        (["--url", "http://127.0.0.1:1"], "the server at http://127.0.0.1:1 is not ready"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_evaluated_is_a_clear_error(options: list[str], said: str, fake: Fake, tmp_path: Path) -> None:
    ended = asking(images_of(tmp_path / "data", TEN), tmp_path / "out", "--url", fake.url, *options)
    assert ended.exit_code == 1
    assert said in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize("label", ["wolf", "8"])
def test_labels_of_other_classes_than_the_model_s_are_an_error(label: str, fake: Fake, tmp_path: Path) -> None:
    ended = asking(images_of(tmp_path / "data", [(label, "right=ant")]), tmp_path / "out", "--url", fake.url)
    assert ended.exit_code == 1
    assert f"does not know 1 of the labels, '{label}' among them (its first class is 'ant')" in ended.output
    assert not fake.asked


def test_a_model_with_a_setting_is_compared_with_the_model_itself(repository: Path, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    assert CliRunner().invoke(training, ["images", "--dataset", "digits", "--out", str(data)]).exit_code == 0
    options = ["--repository", str(repository), "--reference", "digits-csra-r2?max_batch=1", "--limit", "50"]
    ended = asking(data, tmp_path / "out", *options, model="digits-csra-r2")
    assert ended.exit_code == 0, ended.output
    assert "digits-csra-r2 and digits-csra-r2?max_batch=1 give the same class for 50 of 50 images" in ended.output
    logs = sorted(file.name for file in (tmp_path / "out" / "logs").iterdir())
    assert logs == [
        "check-digits-csra-r2-max_batch-1.log",
        "round01-digits-csra-r2-max_batch-1.log",
        "round01-digits-csra-r2.log",
    ]
    assert not (tmp_path / "out" / "blocks").exists()


def test_a_served_model_is_as_accurate_as_its_manifest_says(repository: Path, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    assert CliRunner().invoke(training, ["images", "--dataset", "digits", "--out", str(data)]).exit_code == 0
    ended = asking(data, tmp_path / "out", "--repository", str(repository), model="digits-csra-r2")
    assert ended.exit_code == 0, ended.output
    (model,) = results_in(tmp_path / "out")["models"]
    assert (model["top1"]["of"], model["failed"]) == (360, 0)
    check = model["manifest"]
    assert (check["n"], check["same_images"], check["images_more_here"]) == (360, True, 0)
    assert model["top1"]["share"] == pytest.approx(check["top1"], abs=5e-5)
    assert model["top5"]["share"] == pytest.approx(check["top5"], abs=5e-5)
    # What it lists as wrong is what a client sees.
    wrong = rows_in(tmp_path / "out" / "disagreements.csv")
    assert len(wrong) == 360 - model["top1"]["hits"]
    with serving(repository) as (url, _):
        image = (data / wrong[0]["name"]).read_bytes()
        best = post(url + "/v1/classify", image).json()["results"][0]["predictions"][0]
    assert str(best["index"]) == wrong[0]["digits-csra-r2 index"] != wrong[0]["label"]
    assert not [child for child in psutil.Process().children() if "service" in child.cmdline()]
