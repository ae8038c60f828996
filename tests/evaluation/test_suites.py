"""Suites: what the harnesses find of a model in memory is what a loop over its logits finds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from extras import needs
from forking import start_fork
from tiny_families import make, tokenizer_for

import mm_piece
from mm_piece.data import Example, read
from mm_piece.data.prompts import make_message, render_prompt
from mm_piece.errors import DataError, RecipeError
from mm_piece.evaluation.answers import end_tokens_of, evaluate
from mm_piece.evaluation.divergence import measure_divergence
from mm_piece.evaluation.suites import HARNESSES, SUITES, load_suite, run_suite
from mm_piece.evaluation.suites.schema import TextHarnessConfig
from mm_piece.evaluation.suites.scores import parse_harness_results
from mm_piece.evaluation.suites.task_index import find_tasks
from mm_piece.models.base import load_base
from mm_piece.store.base_record import describe_base
from mm_piece.store.delta_store import DeltaStore

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints" / "tiny"
QUESTIONS = (
    ("Is there a red circle?", "yes"),
    ("Are there more red things or blue things?", "blue"),
    ("How many shapes are there?", "two"),
    ("What is the sign?", "no"),
    ("Describe the picture.", "yes"),
)
CHOICES = ["yes", "no", "two", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of both harnesses, over rows of their own."""
    folder = tmp_path_factory.mktemp("suites")
    lines = [json.dumps({"question": q, "answer": a}) for q, a in QUESTIONS]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    (folder / "lm").mkdir()
    (folder / "lm" / "choice.yaml").write_text(
        _task("toy_choice", folder / "texts.jsonl", "multiple_choice")
        + f'doc_to_text: "{{{{question}}}}"\ndoc_to_choice: {CHOICES}\n'
        + 'doc_to_target: "{{answer}}"\n'
        + "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "lm" / "say.yaml").write_text(
        _task("toy_say", folder / "texts.jsonl", "generate_until")
        + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        + "generation_kwargs: {until: ['!'], max_gen_toks: 3}\n"
        + "metric_list: [{metric: bleu, aggregation: bleu, higher_is_better: true}]\n"
    )
    (folder / "lm" / "code.yaml").write_text(
        _task("toy_code", folder / "texts.jsonl", "generate_until")
        + 'unsafe_code: true\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        + "generation_kwargs: {until: ['!'], max_gen_toks: 3}\n"
        + "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    _images(folder)
    return folder


def _task(name, file, kind):
    return (
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        f"test_split: test\noutput_type: {kind}\n"
    )


def _images(folder):
    """Twelve rows of the base's own data: half of them with the image where the text says."""
    lines = []
    for number, example in enumerate(read("scenes:base/test[:12]")):
        (image,) = example.open_images()
        image.save(folder / f"{number}.png")
        text = f"<image>{example.prompt}" if number % 2 else example.prompt
        row = {"file": str(folder / f"{number}.png"), "question": text, "answer": example.answer}
        lines.append(json.dumps(row))
    (folder / "images.jsonl").write_text("\n".join(lines))
    (folder / "lmms").mkdir()
    (folder / "lmms" / "utils.py").write_text(
        "from PIL import Image\n\ndef shown(row):\n    return [Image.open(row['file'])]\n\n"
        "def asked(row, *rest):\n    return row['question']\n\n"
        "def paths(row):\n    return [row['file'], 3]\n\n"
        "def right(row, said):\n    return {'right': float(said[0] == row['answer'])}\n"
    )
    for name, shown, kind in (
        ("toy_look", "shown", "generate_until"),
        ("toy_film", "paths", "generate_until"),
        ("toy_rounds", "shown", "generate_until_multi_round"),
    ):
        (folder / "lmms" / f"{name}.yaml").write_text(
            _task(name, folder / "images.jsonl", kind)
            + f"doc_to_visual: !function utils.{shown}\n"
            + 'doc_to_text: !function utils.asked\ndoc_to_target: "{{answer}}"\n'
            + "generation_kwargs: {max_new_tokens: 24, until: ['!']}\n"
            + "process_results: !function utils.right\n"
            + "metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]\n"
        )


def write(file, content):
    file.write_text(content)
    return str(file)


def command(*words):
    """The command line in a process of its own, its status, stdout and stderr.

    Harnesses patch what they import.
    """
    process = start_fork("-m", "mm_piece", *map(str, words))
    stdout, stderr = process.communicate(timeout=280)
    return process.returncode, stdout, stderr


@torch.no_grad()
def chosen(model, tokenizer, question):
    """The choice with the highest log-likelihood after the question, token by token."""

    def likelihood(choice):
        before = tokenizer(question, add_special_tokens=False)["input_ids"]
        both = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
        told = torch.log_softmax(model(input_ids=torch.tensor([both])).logits[0].double(), -1)
        return sum(float(told[place - 1, both[place]]) for place in range(len(before), len(both)))

    return max(CHOICES, key=likelihood)


@torch.no_grad()
def said(model, processor, question, most):
    """The greedy continuation of a text, one token at a time."""
    tokenizer, new = processor.tokenizer, []
    ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    for _ in range(most):
        token = int(model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].argmax())
        if token in end_tokens_of(model, processor):
            break
        new.append(token)
    return tokenizer.decode(new).strip()


@pytest.mark.slow
@needs("lm_eval")
def test_own_tasks_are_found_without_a_harness_s(folder):
    """A group's members may be the harness's own: then all are read."""
    from lm_eval.tasks import TaskManager

    (folder / "lm" / "group.yaml").write_text("group: toy_group\ntask: [toy_say, gsm8k]\n")
    given = []

    def note(**options):
        given.append(options)
        own_alone = options.get("include_defaults") is False
        # its own are thousands of files
        return TaskManager(**options) if own_alone else "all"

    include = str(folder / "lm")
    for tasks in (["toy_group"], ["toy_say", "gsm8k"]):
        given.clear()
        config = TextHarnessConfig(tasks=tasks, include=include)
        assert find_tasks(note, config) == "all"
        assert given[-1] == {"include_path": include}

    given.clear()
    config = TextHarnessConfig(tasks=["toy_say", "toy_choice"], include=include)
    assert set(config.tasks) <= set(find_tasks(note, config).all_tasks)
    assert given == [{"include_path": include, "include_defaults": False}]


@pytest.mark.slow
def test_both_harnesses_and_the_divergence_see_the_model_at_its_position(folder, tmp_path):
    suite = write(
        tmp_path / "suite.yaml",
        f"lm-eval: {{tasks: [toy_choice, toy_say], include: {folder}/lm, batch_size: 2}}\n"
        f"lmms-eval: {{tasks: [toy_look], include: {folder}/lmms, batch_size: 5}}\n",
    )
    status, stdout, stderr = command("eval", TINY, "--at", 5, "--suite", suite, "--json")
    assert status == 0, stderr
    found = json.loads(stdout)
    model, processor = mm_piece.load(TINY / "base", store=TINY, at=5)
    rows = read("scenes:base/test[:12]")
    right = sum(a["score"] for a in evaluate(model, processor, rows, max_new_tokens=24)) / 12
    assert 0 < right < 1
    assert found["lmms-eval"]["toy_look"]["right"]["value"] == pytest.approx(right)
    picked = [chosen(model, processor.tokenizer, question) for question, _ in QUESTIONS]
    accuracy = sum(p == a for p, (_, a) in zip(picked, QUESTIONS, strict=True)) / len(QUESTIONS)
    assert found["lm-eval"]["toy_choice"]["acc"]["value"] == pytest.approx(accuracy)
    assert found["lm-eval"]["toy_choice"]["acc"]["stderr"] is not None
    nats = found["kl"]["base"]["nats a token"]["value"]
    apart = measure_divergence(model, processor, read("scenes:base/test"), 5, max_new_tokens=24)
    assert nats == pytest.approx(apart, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_texts_are_greedy_and_as_long_as_the_task_says(folder):
    from lm_eval.models.huggingface import HFLM

    from mm_piece.evaluation.suites import lm_eval
    from mm_piece.evaluation.suites.schema import TextHarnessConfig

    model, processor = mm_piece.load(TINY / "base")
    own = model.generation_config
    own.max_new_tokens, own.do_sample, own.repetition_penalty = 9, True, 3.0
    given = []

    class Listening(HFLM):
        def generate_until(self, requests, **options):
            given.extend(super().generate_until(requests, **options))
            return given

    part = TextHarnessConfig(tasks=("toy_say",), include=str(folder / "lm"), batch_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "_Model", Listening)
        lm_eval.Harness(part).measure_scores(model, processor)
    assert given == [said(model, processor, question, 3) for question, _ in QUESTIONS]
    assert model.generation_config is own


def asked_of(harness_tasks, model, processor, folder, **options):
    """The contexts that lm-eval asks a model, and the answers to those that it generates."""
    from mm_piece.evaluation.suites import lm_eval
    from mm_piece.evaluation.suites.schema import TextHarnessConfig

    asked = []

    class Listening(lm_eval._Model):
        def generate_until(self, requests, **more):
            asked.extend(request.args[0] for request in requests)
            return super().generate_until(requests, **more)

        def loglikelihood(self, requests, **more):
            asked.extend(request.args[0] for request in requests)
            return super().loglikelihood(requests, **more)

    part = TextHarnessConfig(
        tasks=harness_tasks, include=str(folder / "lm"), batch_size=3, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval, "_Model", Listening)
        lm_eval.Harness(part).measure_scores(model, processor)
    return asked


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("typed", [True, False])
def test_a_chat_asks_what_the_base_was_trained_on(folder, typed):
    """A template that takes typed content leaves out strings, which lm-eval would give it."""
    model, processor = mm_piece.load(TINY / "base")
    if typed:  # as LLaVA-1.5's
        processor.chat_template = processor.tokenizer.chat_template = (
            "{% for message in messages %}{{ message.role.upper() }}: "
            "{% for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor %}"
            "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        )
    expected = [render_prompt(_question(text), processor) for text, _ in QUESTIONS]
    assert all(text in shown for shown, (text, _) in zip(expected, QUESTIONS, strict=True))
    asked = asked_of(("toy_say",), model, processor, folder, chat=True)
    assert asked == expected
    asked = asked_of(("toy_choice",), model, processor, folder, chat=True)
    assert sorted(set(asked)) == sorted(expected)


def _question(text):
    turns = [("user", text), ("assistant", "x")]
    return Example(0, [make_message(role, said) for role, said in turns], [], "lm-eval")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_chat_with_examples_and_a_begun_answer():
    from mm_piece.evaluation.suites.lm_eval import _format_question

    processor = tokenizer_for("gemma", "gemma")
    turns = [("system", "Be short."), ("user", "A?"), ("assistant", "a"), ("user", "B?")]
    turns = [{"role": role, "content": text} for role, text in turns]
    shown = _format_question(processor, turns)
    assert shown == (
        "<bos><start_of_turn>system\nBe short.<end_of_turn>\n<start_of_turn>user\nA?<end_of_turn>\n"
        "<start_of_turn>model\na<end_of_turn>\n<start_of_turn>user\nB?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    begun = {"role": "assistant", "content": "It is"}
    assert (
        _format_question(processor, [*turns, begun], add_generation_prompt=False) == shown + "It is"
    )
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    processor.chat_template = refuses + processor.chat_template
    assert "<start_of_turn>user\nBe short.\n\nA?<end_of_turn>" in _format_question(processor, turns)
    with pytest.raises(DataError, match="refuses it: no"):
        processor.chat_template = "{{ raise_exception('no') }}"
        _format_question(processor, turns[1:])


@pytest.mark.slow
def test_a_text_that_is_continued_has_no_end():
    from mm_piece.evaluation.suites.lm_eval import _strip_end_token

    tokenizer = tokenizer_for("llama", "llama", add_bos_token=True, add_eos_token=True)
    first, *_, last = tokenizer("a dog")["input_ids"]
    assert (first, last) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert _strip_end_token(tokenizer)("a dog")["input_ids"] == tokenizer("a dog")["input_ids"][:-1]
    assert tokenizer("a dog")["input_ids"][-1] == last
    begins_alone = tokenizer_for("llava", "llava")
    assert _strip_end_token(begins_alone) is begins_alone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_code_that_a_model_writes_is_not_run_unasked(folder, monkeypatch, capsys):
    from mm_piece.evaluation.suites import lm_eval
    from mm_piece.evaluation.suites.schema import TextHarnessConfig

    model, processor = mm_piece.load(TINY / "base")
    part = TextHarnessConfig(tasks=("toy_code",), include=str(folder / "lm"))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    assert lm_eval.Harness(part).measure_scores(model, processor) == {}
    assert "toy_code: left out" in capsys.readouterr().out
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert "exact_match" in lm_eval.Harness(part).measure_scores(model, processor)["toy_code"]


@pytest.mark.slow
def test_what_was_found_is_shown_when_a_harness_fails(folder, tmp_path):
    for name, told in (("toy_film", "only images"), ("toy_rounds", "asks in rounds")):
        suite = write(
            tmp_path / "suite.yaml",
            f"lmms-eval: {{tasks: [{name}], include: {folder}/lmms, limit: 2}}\n",
        )
        status, stdout, stderr = command("eval", TINY, "--at", 1, "--suite", suite)
        assert status == 2
        (line,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
        assert name in line and told in line
        assert "nats a token" in stdout


def test_a_base_without_eyes_is_shown_no_images(tmp_path, monkeypatch, capsys):
    base = make("qwen2", tmp_path / "base")
    described = describe_base(load_base(base)[0], str(base), None, tmp_path / "store")
    store = DeltaStore.create(tmp_path / "store", described.facts, _recipe(tmp_path))
    monkeypatch.setattr("mm_piece.evaluation.suites._load_harness", lambda name, part: None)
    suite = write(tmp_path / "suite.yaml", "kl: false\nlmms-eval: {tasks: [pope]}\n")
    assert list(run_suite(store.path, load_suite(suite))) == []
    said = capsys.readouterr()
    assert "the base sees no images" in said.err and "left out" not in said.out


def _recipe(folder):
    rows = write(folder / "rows.json", '[{"prompt": "a", "answer": "b"}]')
    task = f"{{name: a, train: {rows}, test: {rows}}}"
    return f"base: {folder}/base\nstore: {folder}/store\ntasks: [{task}]\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content, told",
    [
        pytest.param(
            "lm-eval: {tasks: [no_such_task]}",
            "lm-eval has no task 'no_such_task'",
            marks=pytest.mark.slow,
        ),
        ("lm-eval: {tasks: [mmlu], include: nowhere}", "include nowhere: there is no such folder"),
        ("lm-eval: {task: [mmlu]}", "unknown key 'lm-eval.task'; did you mean 'tasks'?"),
        ("lm_eval: {tasks: [mmlu]}", "unknown key 'lm_eval'; did you mean 'lm-eval'?"),
        ("lm-eval: {tasks: []}", "lm-eval.tasks"),
        ("lm-eval: {tasks: [mmlu], limit: 0}", "lm-eval.limit"),
        ("- mmlu", "must be a mapping of keys"),
        ("kl: true\nkl: false", "stands twice"),
    ],
)
def test_a_wrong_suite_is_told_in_one_line(content, told, tmp_path):
    with pytest.raises(RecipeError) as error:
        list(run_suite(TINY, load_suite(write(tmp_path / "suite.yaml", content))))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_suite_names_those_there_are():
    with pytest.raises(RecipeError, match="allowed: general, or a YAML file"):
        load_suite("generel")


def test_a_harness_that_is_not_installed_is_named_with_what_brings_it(monkeypatch):
    monkeypatch.setattr("mm_piece.evaluation.suites.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"lm-eval is not installed: pip install 'mm-piece\[suit"):
        list(run_suite(TINY, SUITES["general"]))


@pytest.mark.slow
def test_suite_takes_the_place_of_other_choices():
    status, _, stderr = command("eval", TINY, "--suite", "general", "--kl")
    assert status == 2 and "leave out --kl and --task" in stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_general_suite_names_tasks_that_the_harnesses_have():
    from lm_eval.tasks import TaskManager

    assert set(SUITES["general"].harness_configs()) == set(HARNESSES)
    assert set(SUITES["general"].harness_configs()["lm-eval"].tasks) <= set(TaskManager().all_tasks)
    code = (
        "from lmms_eval.tasks import TaskManager; from mm_piece.evaluation.suites import SUITES\n"
        "assert {*SUITES['general'].harness_configs()['lmms-eval'].tasks} <= "
        "{*TaskManager().all_tasks}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=200)


def test_numbers_of_a_harness_become_scores():
    found = parse_harness_results(
        {
            "group": {"alias": "group", "sample_len": 3},
            "gsm": {
                "name": "gsm",
                "exact_match,strict": 0.25,
                "exact_match_stderr,strict": 0.1,
                "exact_match,none": 0.5,
                "exact_match_stderr,none": "N/A",
                "exact_match_stderr_clt,none": 0.2,
                "broken,none": float("nan"),
            },
        }
    )
    assert found == {
        "gsm": {
            "exact_match strict": {"value": 0.25, "stderr": 0.1},
            "exact_match": {"value": 0.5, "stderr": 0.2},
        }
    }
