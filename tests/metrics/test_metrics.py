"""Each scoring rule: against libraries, brute force and values by hand."""

import math
import re
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import sentence_bleu

from mm_piece.metrics.answers import (
    ANSWER_METRICS,
    normalise_text,
    normalise_vqa_answer,
    split_words,
)

LATIN = st.text(alphabet="abcde XYZ.,'-019", max_size=40)


def one(metric, prediction, *accepted):
    return ANSWER_METRICS[metric]([prediction], [list(accepted)])[0]


NORMALISED = [
    *(("An  apple, the 2.50!", "apple 2.50"), ("  Yes.\n", "yes"), ("don’t", "don t")),
    # signs, points, thousands
    *(("-5", "-5"), ("\u22125", "-5"), ("10-5", "10 5"), ("(-.5)", "-0.5"), (".5", "0.5")),
    *(("1,000", "1000"), ("1,234,567.8.", "1234567.8"), ("1.000", "1.000"), ("1,5", "1 5")),
    *(("1,2,3", "1 2 3"), ("1,000,2", "1 000 2"), ("5,1,000", "5 1 000"), ("No.5", "no 5")),
    # articles and the letter A
    *(("A", "a"), ("A.", "a"), ("(A)", "a"), ("the", "the"), ("A, B", "a b"), ("A & B", "a b")),
    *(("Vitamin A", "vitamin a"), ("the 'cat'", "cat"), ("the the cat", "cat")),
    # other scripts
    *(("A。", "a"), ("支持。", "支持"), ("「是」", "是"), ("Ａ１！", "a1"), ("हिन्दी।", "हिन्दी")),
    *(("Die „Größe“ – ja!", "die größe ja"), ("Gro\u0308ße", "größe")),
    # nothing but punctuation
    *(("<", "<"), (" > ", ">"), ("＜", "<"), ("", "")),
]


@pytest.mark.parametrize(("text", "normalised"), NORMALISED)
def test_normalise(text, normalised):
    assert normalise_text(text) == normalised


EXACT = [
    *(("A Red circle.", "red circle", 1), ("the  CAT", "cat!", 1), ("1,000", "1000", 1)),
    *(("1,000", "1.000", 0), ("1.5", "15", 0), ("-5", "5", 0), ("two", "2", 0)),
    *(("<", ">", 0), ("!", "a", 0), ("A", "B", 0), ("支持", "反对", 0)),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), EXACT)
def test_exact(prediction, answer, score):
    assert one("exact", prediction, answer) == score
    assert one("exact", prediction, "three", answer, "four") == score


def left_out_in_turn(said, answers):
    rest = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    return fmean(min(1, others.count(said) / 3) for others in rest)


@given(st.lists(st.sampled_from(["red", "blue", "grey"]), min_size=4, max_size=12))
def test_vqa_is_the_mean_over_annotators_left_out(answers):
    assert one("vqa", "red", *answers) == pytest.approx(left_out_in_turn("red", answers))


def test_vqa_by_hand():
    votes = [one("vqa", "red", *["red"] * n, *["blue"] * (10 - n)) for n in range(6)]
    assert votes == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    assert one("vqa", "red", "red", "blue") == 1  # a list of right answers, no panel
    assert one("vqa", "red", "green", "blue", "grey") == 0


PROCESSED = [
    *(("Two dogs", "2 dogs"), ("None", "0"), ("The cat.", "cat"), ("On\n the\ttable", "on table")),
    *(("dont know", "don't know"), ("Don't", "don't"), ("couldnt", "couldn't"), ("cat's", "cat's")),
    *(("its", "its"), ("were", "were")),  # words of their own
    *(("10 oclock", "10 o'clock"), ("Yall", "y'all"), ("yes maam", "yes ma'am"), ("twas", "'twas")),
    *(("yalldve", "yalldve"), ("Id've", "id've"), ("ow's'at", "'ow's'at"), ("Im", "im")),
    *(("couldnt've", "couldn't've"), ("she'dve", "she'd've"), ("someones cat", "someone's cat")),
    *(("somethingll", "something'll"), ("somebodyd've", "somebody'd've"), ("y'allll", "y'all'll")),
    *(("1,000", "1000"), ("3.5", "3.5"), ("50%", "50%"), ("yes/no", "yes no"), ("what?", "what")),
    *(
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("x -y t-z", "x y tz"),
        ("red, blue", "red blue"),
    ),
    *(("re-do, now-ish", "re do now ish"), ("re-do - now", "redo now"), ("1,000 m/s", "1000 ms")),
    *(("a", "a"), ("?", "?")),  # nothing would be left
]


@pytest.mark.parametrize(("text", "processed"), PROCESSED)
def test_vqa_processing(text, processed):
    assert normalise_vqa_answer(text) == processed


def published():
    """VQA's own processing, as lmms-eval has kept it."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()


@pytest.mark.slow
def test_vqa_knows_every_published_contraction():
    table = published().CONTRACTIONS
    assert len(table) == 120
    for written, contraction in table.items():
        if written == written.lower():  # an answer is lower case when it is looked up
            assert normalise_vqa_answer(written) == contraction


VQA_TEXT = st.lists(
    st.sampled_from(
        [
            "a",
            "The",
            "Two",
            "none",
            "dont",
            "1,000",
            "3.5",
            "3.",
            ".5",
            "-",
            "?",
            ",",
            "/",
            "x",
            " ",
        ]
    ),
    max_size=8,
).map("".join)


@pytest.mark.slow
@given(text=VQA_TEXT | LATIN)
def test_vqa_processing_is_the_published_one(text):
    processor = published()
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    expected = processor.process_digit_article(processor.process_punctuation(flat))
    assert normalise_vqa_answer(text) == (expected or " ".join(text.lower().split()))


@pytest.mark.parametrize(
    "prediction",
    [
        *("B", "b", "(B)", "[B]", "B.", "B)", "B:", "**B**", "**B.** cat", "B) cat", "b. cat"),
        *("B\nBecause it barks.", "B: a cat", "Ｂ", "B。", "B、猫", "B.猫", "（B）猫"),
        *("The answer is B", "The answer is B because it barks", "Answer: B", "answer: b."),
        *("**Answer**: (B)", "The correct option is (B).", "It barks. So the answer is: B. A dog"),
        *("Option B", "Option B: cat", "The answer is option B.", "B is the correct answer"),
        *("答案是B", "答案：B", "答案是B，因为"),
    ],
)
def test_choice_reads_the_letter(prediction):
    accepted = ["B", "(B)", "B.", "B. cat"]
    assert ANSWER_METRICS["choice"]([prediction] * 4, [[answer] for answer in accepted]) == [1] * 4
    assert one("choice", prediction, "A", "C", "C. dog") == 0


@pytest.mark.parametrize(
    "prediction",
    [
        *("A cat is on the mat", "a", "A.M.", "A+", "A-frame", "Answer", "", "An", "-5", "e.g. x"),
        *("I think so", "The answer isn't B", "The answer is I'm not sure", "B12", "Yes", "."),
        "The answer is a cat",
    ],
)
@pytest.mark.parametrize("letter", "ABEI")
def test_choice_takes_no_letter_from_words(prediction, letter):
    assert one("choice", prediction, letter) == (prediction == "a" and letter == "A")


OPTIONS = [
    *(("B. cat", "cat", 1), ("(B) A cat.", "cat", 1), ("cat", "B. cat", 1), ("A cat", "cat", 1)),
    *(("The answer is B. cat", "the cat", 1), ("The answer is cat.", "cat", 1)),
    *(("B. dog", "cat", 0), ("B", "B. cat", 1), ("", "B", 0), ("B", "", 0)),
    ("C. cat", "B. cat", 0),  # letters decide
    ("B", "cat", 0),  # cannot be told without the options
]


@pytest.mark.parametrize(("prediction", "answer", "score"), OPTIONS)
def test_choice_with_the_text_of_an_option(prediction, answer, score):
    assert one("choice", prediction, answer) == score


def test_choice_is_quick_on_runs_of_marks():
    assert one("choice", "*" * 200_000, "B") == 0
    assert one("choice", "option " + " " * 200_000 + "x y", "B") == 0


@given(said=LATIN, answer=LATIN)
def test_rouge_is_that_of_rouge_score(said, answer):
    from rouge_score.rouge_scorer import RougeScorer

    if not (re.search(r"\w", said) and re.search(r"\w", answer)):
        return  # rouge-score knows no text without words
    reference = RougeScorer(["rougeL"]).score(answer, said)["rougeL"].fmeasure
    assert one("rouge-l", said, answer) == pytest.approx(reference)


def test_rouge_by_hand():
    # "cat on mat" is common: 3 of 4 and 3 of 5 words
    assert one("rouge-l", "The cat on mat", "a cat sat on mat") == pytest.approx(6 / 9)
    assert one("rouge-l", "Größe zählt", "größe ist egal") == pytest.approx(2 / 5)
    assert one("rouge-l", "我不支持", "我支持") == pytest.approx(6 / 7)
    assert one("rouge-l", "?", "!") == 0
    assert one("rouge-l", "dog", "cat", "a dog") == pytest.approx(2 / 3)


WORDS = [
    ("It's 2.5 black-and-white cats!", ["it", "s", "2", "5", "black", "and", "white", "cats"]),
    ("Über Straße_3", ["über", "straße", "3"]),
    ("GPT支持。ネコ", ["gpt", "支", "持", "ネ", "コ"]),
    *(("हिन्दी", ["हिन्दी"]), (" ? !", ["?", "!"]), ("", [])),
]


@pytest.mark.parametrize(("text", "expected"), WORDS)
def test_words(text, expected):
    assert split_words(text) == expected


def longest_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


@given(said=st.text(max_size=20), answer=st.text(max_size=20))
def test_edit_is_twice_the_common_characters_over_all(said, answer):
    a, b = said.strip(), answer.strip()
    expected = 2 * longest_common(a, b) / (len(a) + len(b)) if a or b else 1
    assert one("edit", said, answer) == pytest.approx(expected)


def test_edit_by_hand():
    assert one("edit", "ab", "ba") == pytest.approx(1 / 2)  # by Levenshtein it would be 0
    assert one("edit", "return x", "pass", "return y") == pytest.approx(14 / 16)
    assert one("edit", "Cat.", "cat") == pytest.approx(4 / 7)


@given(said=LATIN, answers=st.lists(LATIN, min_size=1, max_size=3))
def test_bleu_is_that_of_sacrebleu(said, answers):
    if said.strip() in {answer.strip() for answer in answers}:
        return
    reference = sentence_bleu(said, answers, use_effective_order=True).score
    assert one("bleu", said, *answers) == pytest.approx(reference / 100)


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; lengths are equal
    said, answer = "the cat sat on the mat", "the cat sat on a mat"
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert one("bleu", said, answer) == pytest.approx(expected)
    assert one("bleu", "我支持它。", "我支持你。") == pytest.approx(
        (4 / 5 * 2 / 4 * 1 / 3 * (1 / 2) / 2) ** (1 / 4)
    )
    assert one("bleu", "cat", "cat") == 1


def ngrams(text, n):
    tokens = text.split()
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def cider_d(predictions, references):
    """CIDEr-D / 10 after section 4 of Vedantam et al. 2015, n-gram order by n-gram order."""
    num = len(predictions)

    def weighted(counts, n):
        holds = {
            g: sum(any(g in ngrams(r, n) for r in refs) for refs in references) for g in counts
        }
        return {g: count * math.log(num / max(1, holds[g])) for g, count in counts.items()}

    def cosine(said, reference, n):
        h, r = weighted(ngrams(said, n), n), weighted(ngrams(reference, n), n)
        norms = math.hypot(*h.values()) * math.hypot(*r.values())
        clipped = sum(min(h[g], r[g]) * r[g] for g in h.keys() & r.keys())
        gap = len(said.split()) - len(reference.split())
        return clipped / norms * math.exp(-(gap**2) / (2 * 6**2)) if norms else 0

    return [
        fmean(cosine(said, r, n) for n in range(1, 5) for r in refs)
        for said, refs in zip(predictions, references, strict=True)
    ]


def test_cider_is_that_of_the_paper():
    predictions = ["a cat on the red mat", "two dogs in a park", "a man rides a horse on a beach"]
    references = [
        ["a cat sits on the red mat", "the cat on a mat"],
        ["two dogs run in a park", "dogs in a green park", "a park"],
        ["a man rides a horse on a beach"],
    ]
    scores = ANSWER_METRICS["cider"](predictions, references)
    assert scores == pytest.approx(cider_d(predictions, references))
    assert 0 < scores[0] < 1
    assert 0 < scores[1] < 1
    assert scores[2] == pytest.approx(1)


def test_cider_of_perfect_captions_is_one_where_references_differ():
    captions = [
        "a cat on the mat",
        "two dogs in one park",
        "Ein Mann reitet am Strand!",
        "我支持你们",
    ]
    assert ANSWER_METRICS["cider"](captions, [[c] for c in captions]) == pytest.approx([1] * 4)
    captions = ["a a mat park a a", "on a one on two red", "the a a mat red"]  # rounding: 1 + 2e-16
    assert max(ANSWER_METRICS["cider"](captions, [[c] for c in captions])) <= 1


def test_cider_looks_at_words_alone():
    captions = ["a cat on the mat", "two dogs in one park"]
    shouted = [caption.upper() + "!" for caption in captions]
    assert ANSWER_METRICS["cider"](shouted, [[c] for c in captions]) == pytest.approx([1, 1])


def test_cider_counts_words_over_the_whole_task():
    said, answers = "a cat on the mat", ["a cat on the rug"]
    common = ANSWER_METRICS["cider"](
        [said, "x", "x"], [answers, ["a cat on the sofa"], ["a cat here"]]
    )
    rare = ANSWER_METRICS["cider"]([said, "x", "x"], [answers, ["two dogs"], ["three birds"]])
    assert 0 < common[0] < rare[0]


def test_cider_is_zero_where_no_word_tells_examples_apart():
    caption = "a cat on the mat"
    assert one("cider", caption, caption) == 0
    assert ANSWER_METRICS["cider"]([caption] * 2, [[caption]] * 2) == [0, 0]
    assert ANSWER_METRICS["cider"](["", "cat"], [[""], [""]]) == [0, 0]


def test_cider_needs_four_words_for_one():
    assert ANSWER_METRICS["cider"](["red cat", "x"], [["red cat"], ["blue dog"]])[
        0
    ] == pytest.approx(0.5)
