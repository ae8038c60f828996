"""The letters that a text names: one table of texts, and what follows from it for `choice`."""

import time

import pytest

from mm_piece.scoring import METRICS
from mm_piece.scoring.choice import read_option

# letters -> texts that name just them; "" -> texts that name none, or hedge
NAMED = {
    "B": [
        *("The animal in the picture is a cat, and hence the answer: (B).",),
        *(
            "Looking at the image, (B) is the most plausible.",
            "I am going for B",
        ),
        *(
            "The answer's B",
            "Answer is option (B), a cat.",
            "It should be B",
            "It would be B",
        ),
        *(
            "The right one is B.",
            "So B is right",
            "Thus the answer is B) cat.",
        ),
        *(
            "B) cat\n\nExplanation: the animal has whiskers.",
            "**Answer: B) cat**",
        ),
        *(
            "Answer:  \n\n  **B**",
            "<b>B</b>",
            "B\n\nThe image shows a cat.",
            "B. It's a cat!",
        ),
        *(
            "B: The cat",
            "B. Yes",
            "(B) No",
            "B. 42",
        ),
        *(
            "I would choose option B because A and C are dogs.",
            "Between A and B, B is better",
        ),
        *(
            "Of A and B, I choose B",
            "A is too small; B fits; so B.",
        ),
        *(
            "Though A looks right, the answer is B.",
            "It can't be A, so it's B.",
        ),
        *(
            "A cannot be right, therefore B",
            "A doesn't match. B does. So the answer is B.",
        ),
        *(
            "Answer) B",
            "Answer >> B",
            'The correct answer is "B".',
        ),
        *(
            "The correct answer is 'B'.",
            "The final answer is (B) cat",
            "My final choice is B",
        ),
        *(
            "Correct answer is B!",
            "The answer is B，因为有胡须",
            "选B选项",
            "B选项正确",
            "应选B",
            "应选择B",
        ),
        *(
            "答案是：B。",
            "答案是「B」",
            "正确选项：B",
            "【答案】B",
            "答案】B",
            "[答案] B",
            "【答案】 (B)",
            "[Answer] B",
        ),
        *(
            "<answer> B </answer>",
            "<answer>(B)</answer>",
            "\\boxed{ B }",
            "\\boxed{\\mathrm{B}}",
        ),
        *(
            "$\\mathbf{B}$",
            "The answer is $B$.",
            "\\text{B}",
        ),
        *(
            "Therefore, the answer is $\\boxed{B}$",
            "ｂ",
            "Ｂ．",
            "⒝",
        ),
        *(
            "The answer is B. A is wrong.",
            "B. A is wrong",
            "B, A is wrong",
            "A is wrong, B is right",
        ),
        *("B. C is wrong too", "The answer is B, A is wrong", "(B), (A) is wrong", "B; A isn't"),
        *("Answer: (B) cat because..", "I believe the right answer is B."),
        *("Judging by the ears, it's B.", "My choice is B"),
        *("Let me think... It's a cat, which is option B.", "Correct option: b", "OPTION B"),
        *("The answer must be B", "The answer can only be B", "It has to be B"),
        *("In conclusion, the answer is B", "This corresponds to option B."),
        *("The image depicts option (B).", "Option B best describes the image."),
        *("B seems to be the best answer", "B) It's a cat.", "B: It's a cat since A is a dog"),
        *("B. Neither A nor C fits.", "(B) because (A) and (C) are wrong", "Not A. Not C. B."),
        *("It's not A or C. It's B.", "A and C are wrong, so B."),
        *("C is a distractor; the answer is B.", "The answer isn't A or C, but B."),
        *("The answer is B rather than A.", "The answer is B instead of C"),
        "The answer is B (not A)",
        "The correct answer is option (B) because option (A) is incorrect.",
        *("answer is option b", "ANSWER IS B", "the correct answer is b) cat"),
        *("b) cat is the correct answer", "Answer: B) cat. A) dog is wrong.", "Solution: B"),
        *("Ans: (b)", "Response: B", "\\boxed{\\textbf{(B)}}", "$$\\boxed{B}$$"),
        *("\\[ \\boxed{\\text{B}} \\]", "The answer is $\\boxed{\\textbf{B}}$"),
        *("**Final Answer**: B", "**Final Answer:**\n\n**B**"),
        *("Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.", "答案选择B"),
        *(
            "选项 B 正确",
            "正确的选项是B",
            "答案应为B",
            "答案就是B",
            "B 是正确答案",
            "本题选B",
            "本题答案为B",
            "综上，选B",
        ),
        *(
            "综上所述，答案是B",
            "选择 B 选项",
            "选(B)",
            "B．猫",
            "B）",
            "选B，因为A错",
            "A错，选B",
            "A不对，B对",
        ),
        "B. The animal has whiskers. Option A shows a dog and option C shows a bird.",
        *("B. A cat", "The answer is B: A cat", "B. I think it is a cat"),
        "The picture shows a cat. Therefore, the correct answer is B. cat.",
        *("It is a cat, so the answer would be option B.", "B) because I see whiskers"),
        *("B because I see a cat", "The answer is B as seen in the image"),
        *("B as shown in the picture", "B for sure", "I am confident the answer is B"),
        *("There is no doubt the answer is B", "It is not A. The answer is B"),
        *("I'm sure it is B.", "The letter is B", "I select B", "Selecting B", "Choose B."),
        *("Pick (B).", "The answer is... B", "The answer is - B", "The answer is\n\nB"),
        *("The answer: B", "Answer is: B", "Answer:B", "answer=B", "Answer：B", "Ans.: B"),
        *("The answer is ‘B’", "The answer is 'B'.", 'The answer is "B"', "“The answer is B.”"),
        *("B, of course", "B, obviously.", "Obviously B", "B. Correct!", "Correct! B", "B ✓"),
        *("✅ B", "→ B", "=> B", "B 😊", "(B", "B]", "B }", "answer: {B}", "[[B]]", "<<B>>"),
        *("((B))", "**(B)**", "**B**: cat", "**B. cat**", "**B) cat**", "__B__ - cat", "B<br>"),
        *("B\r\n", "B\u200b", "\ufeffB"),
        "The correct answer is **(B) cat**.\n\nHere is why:\n- (A) is a dog.\n- (C) is a bird.",
        *("Let's see.\n(A) dog: no.\n(B) cat: yes.\nSo B.", "1. B", "The right choice is (B)!"),
        *("B is the only one that fits", "Only B is correct", "Jawabannya adalah B"),
        *("Die Antwort: B.", "B, weil es miaut", "B, parce que c'est un chat"),
        *("B, porque es un gato", "C'est la réponse B.", "La opción correcta es B"),
        *("A alternativa correta é B", "L'opzione corretta è la B", "正解はBです。", "Bです。"),
        *(
            "答えは「B」です",
            "답: B",
            "B번",
            "정답은 B입니다.",
            "Câu trả lời: B",
            "Chọn B",
            "คำตอบคือ B",
        ),
        *("उत्तर: B", "الإجابة الصحيحة هي B", "Правильный вариант: B", "Верный ответ: B"),
        *(
            "Odpowiedź: B",
            "Cevap: B",
            "De juiste keuze is B",
        ),
        *("B", "b", "(B)", "(b)", "[B]", "{B}", "<B>", "B.", "B)", "b)", "B:", "**B**"),
        *("**B.** cat", "*B*", "_B_", "`B`", "B) cat", "b. cat", "B\nBecause it barks."),
        *(
            "B: a cat",
            "B: cat",
            "Ｂ",
            "B。",
            "B、猫",
            "B.猫",
            "（B）猫",
            "【B】",
            "「B」",
            "\\boxed{B}",
        ),
        *("$\\boxed{B}$", "\\boxed{\\text{B}}", "\\boxed{(B)}", "\\boxed{B. cat}", "\\(B\\)"),
        *("$B$", "$\\text{B}$", "\\textbf{B}", "\\mathbf{B}"),
        *("So the final answer is \\boxed{B}.", "B - cat", "B – cat", "B — cat", "B -> cat"),
        *("B (cat)", "B, cat", "B; cat", "B, because it barks", "B because it barks"),
        *("B, since it barks", "B, not A", "B rather than A", "B, because A is wrong"),
        *("B. It is not A.", "B is correct", "B is the correct answer", "(B) is right"),
        *("B would be correct, I guess", "B, as (A) shows a dog", "It is B", "It's B."),
        *("it is B", "It must be B.", "that's B", "The answer is B", "The answer is (B)."),
        *("The answer is B because it barks", "The answer is B, because A is wrong"),
        *("The answer is **B**", "**Answer**: (B)", "Answer: B", "answer: b.", "Answer:\nB"),
        *("Answer: B\nExplanation: A is wrong because it is a dog", "### Answer\nB", "ANSWER: B"),
        *("Answer B", "The correct option is (B).", "The correct choice is B: cat"),
        *("The correct answer is option B", "Option B", "option b", "Option B: cat"),
        *("(Option B)", "Choice B", "Letter B", "the answer is b", "The answer is: B. A dog"),
        *("It barks. So the answer is: B. A dog", "It has whiskers, so B", "Thus, B."),
        *("Therefore (B)", "… so it must be B", "Hence B is correct.", "I choose B"),
        *("I would go with B.", "I'd pick option B", "I think it's B", "I think the answer is B"),
        *("My answer is B", "My guess: B", "Final answer: B"),
        *("A looks plausible, but the final answer is B", "not X, it is B", "Not A, but B"),
        *("not (A) but (B)", "The answer is not A, it is B", "It isn't A. It is B."),
        *("A is wrong, so B", "A is incorrect. B", "A is wrong; C is wrong; B is correct"),
        *("Neither A nor C, so B", "A? No, B.", "A. Wait, no: B"),
        *("The answer is A. Wait, the answer is B.", "I thought A, actually B"),
        "The answer is A. However, the picture shows two. So the answer is B.",
        "If the answer were A, it would bark. The answer is B.",
        *("A) cat\nB) dog\nC) bird\nAnswer: B", "A. cat B. dog. The answer is B", "The cat (B)"),
        *("cat (B)", "It shows a cat [B].", "It barks.\nB", "It barks. B", "Yes, B", "Sure! B"),
        *("- B", "> B", "• B", "# B", "<answer>B</answer>", "<think>A or C? It is A.</think>B"),
        *("<|begin_of_box|>B<|end_of_box|>", '"B"', "'B'", "“B”", "选B", "选 B", "选B。", "我选B"),
        *(
            "答案是B",
            "答案：B",
            "答案是B，因为",
            "答案为B",
            "答案选B",
            "故选B",
            "所以选B",
            "正确答案是 B",
            "正确选项是B",
            "应该选B",
        ),
        *(
            "选项B",
            "B选项",
            "B是正确的",
            "B正确",
            "是B",
            "不是A，是B",
            "不选A，选B",
            "因此答案是B。",
            "答えはB",
            "答えはBです",
        ),
        *(
            "正解はB",
            "Bです",
            "Bが正解です",
            "정답은 B",
            "정답: B",
            "답은 B입니다",
            "B입니다",
            "Die Antwort ist B",
        ),
        *("Antwort: B", "Die richtige Antwort lautet B.", "B ist richtig", "Ich wähle B"),
        *("Es ist B", "La réponse est B", "Réponse : B", "La bonne réponse est (B)", "C'est B"),
        *("Je choisis B", "La respuesta es B", "Respuesta: B", "La respuesta correcta es la B"),
        *("Es la B", "A resposta é B", "Letra B", "La risposta è B", "Ответ: B"),
        *("Правильный ответ — B", "Правильный ответ: B", "الإجابة هي B", "Đáp án: B"),
        *("Jawaban: B", "B?", "B!", "B...", "B…", "  B  ", "B\n\n", "B,"),
        *("The answer is B, not A", "B and not A", "(B) cat, not (A) dog", '{"answer": "B"}'),
        *("B = cat", "𝐁", "Ⓑ", "Definitely B", "Probably B.", "the correct letter is B"),
        *("The best match is B", "Correct answer: B", "correct: B", "B it is"),
        *("B is more likely than A", "A or B, but B is more likely"),
        *("Both seem fine, but B is the best answer", "The answer would be B", "Answer - B"),
        *("Answer = B", "Answer → B", "The answer to this question is B"),
        *("The answer to the question is B", "Answer (B)", "B | cat", "B/", "I think that's B"),
        *("The answer is not A. B is right.", "The correct answer is (B) a cat."),
        "Looking at the picture, there are two dogs.\n\n**Answer: B**",
        "Based on the image, the answer is **B. cat**",
        *("B. cat\n\nThe picture shows a cat, not a dog (A).", "(B) cat is the correct answer"),
        *("The correct answer is B: a cat, as option A has no tail.", "Answer is B", "ans: B"),
        *("Ans: B", "I'd say B.", "I'd say (B)", "Clearly, B.", "My final answer is: **B**."),
        *("The best option is B.", "B 。", "The answer (B) is supported by the picture"),
        *("So, the correct option is: (B)", "*Answer*: B", "__B__", "B (not A)"),
        *("Option (B) is correct because A is wrong.", "The answer is definitely B!"),
        *("It's option B", "It is option (B).", "option B is right", "I believe B is correct."),
        *("Among the options, B is the most likely", "The only plausible choice is B"),
        *("B. Because A is wrong", "B is the best choice", "I chose B", "The answer is letter B"),
        *("Alternative B", "alternativa B", "Opción B", "L'option B", "Wybieram B", "不是A而是B"),
        *(
            "选择B",
            "选择(B)",
            "答案是(B)猫",
            "答案：(B)",
            "正确答案：B",
            "最终答案是B",
            "我认为答案是B",
            "我觉得选B",
            "应该是B",
        ),
        *(
            "图中是猫，所以选B。",
            "故答案为B",
            "故选：B",
            "B。因为它叫",
            "B，因为它叫",
            "答案是B选项",
            "B对",
            "答案是B，不是A",
        ),
        *("The answer is B cat", "The right answer: option (b)"),
    ],
    "D": [
        *("D", "d.", "It is D", "so D", "D because"),
    ],
    "F": [
        *("F", "(F)", "The answer is F", "选F"),
    ],
    "A": [
        *("A", "a", "A.", "A, because it barks", "A because", "The answer is A."),
        *("The answer is a.", "A - cat", "A: cat", "It is A", "A is correct", "\\boxed{A}", "选A"),
        *("答案是A", "(a)", "A is the answer", "A. A cat", "Answer: A"),
    ],
    "I": [
        *("I", "(I)", "The answer is I."),
    ],
    "E": [
        *("E", "E. cat"),
    ],
    "": [
        *(
            "A or B or C",
            "either (A) or (B)",
            "Both",
            "Can't tell",
            "None",
            "Neither",
        ),
        *(
            "I would not choose B",
            "I wouldn't pick B",
            "B is not correct",
            "B isn't right",
        ),
        *(
            "B can't be right",
            "B is incorrect",
            "Not (B)",
            "Never B",
            "Anything but B",
        ),
        *(
            "A nor B",
            "Could be any of A, B, C, D",
            "All: A, B, C, D",
            "A.B.C.D",
        ),
        *(
            "A) cat, B) dog",
            "A) cat / B) dog",
            "Option A: cat\nOption B: dog",
        ),
        *(
            "Option A or option B",
            "option A and option B",
            "a or b",
            "(a) or (b)",
        ),
        *(
            "It's either A or B.",
            "A oder vielleicht B",
            "A 或 B",
            "a dog",
            "An apple",
        ),
        *("A or B is right", "Either A or B is correct", "I'm torn between A and B"),
        *("Could be A, could be B", "A (or B)", "A or, maybe, B", "Not sure: A or B?"),
        *("A... or B", "I'd say A or B", "probably A or B", "A vs B", "Options: A) cat B) dog"),
        *("A) cat\nB) dog\nC) bird\nD) fish", "(A) cat\n(B) dog", "Which is it, A or B?"),
        *("A cat, B dog", "All of the above", "none", "A and/or B", "A; or B", "A, or B"),
        *("A or (B)", "B or C or D", "(A), (B) or (C)", "A or B. Hard to say."),
        *("The answer is A, or B.", "The answer could be A or B", "maybe A, maybe B"),
        *("It's A. It's B.", "I guess A or B", "Either.", "A. dog\nB. cat"),
        *(
            "A. dog, B. cat, C. bird",
            "A: dog\nB: cat",
            "[A] dog [B] cat",
        ),
        *("I would choose between A and B", "The choices are (A) cat, (B) dog", "选项有A、B、C"),
        *(
            "A或者B都可以",
            "A还是B呢",
            "不知道",
            "A boy is playing",
            "I see a cat",
            "A little girl",
        ),
        *("(A) or (B)", "A or B", "A or B?", "A) or B)", "either A or B", "It is A or B"),
        *("It is either A or B", "The answer is A or B", "The answer is either (A) or (B)"),
        *("A, B, C or D", "A, B, or C", "A or maybe B", "A or perhaps B", "maybe A or B"),
        *("A) cat B) dog", "A) cat\nB) dog\nC) bird", "A. cat B. dog C. bird D. fish"),
        *("(A) cat (B) dog", "A: cat, B: dog", "a) cat b) dog", "neither A nor B"),
        *("Neither (A) nor (B)", "not A", "Not B", "It is not B", "The answer is not B"),
        *("the answer isn't B", "A cat is sitting", "A cat is on the mat", "A dog.", "A-frame"),
        *("A+", "A.M.", "e.g. x", "I think so", "I think it is a dog", "I, for one, think so"),
        *("I'm not sure", "The answer is I'm not sure", "The answer is a cat"),
        *("The answer is A cat", "Answer: A cat", "An", "Answer", "-5", "B12", "Yes", "No", "."),
        *("", "Vitamin", "It is a cat", "So a cat", "C'est la vie", "D'accord", "U.S."),
        *("I am sure", "A man and a dog", "a and the", "The options are A, B, C or D"),
        *(
            "I don't know",
            "None of them",
            "A或B",
            "A还是B",
            "选A或B",
            "不是B",
            "答案不是B",
            "A oder B",
        ),
        *("A ou B", "AまたはB", "\\boxed{A} or \\boxed{B}", "It could be A or B."),
        *("The answer is A. The answer is B.", "I like B minor", "They play in B flat"),
        *("Plan A failed", "If the answer is B, it barks", "I don't think it is B", "A is wrong"),
        *("(B) is incorrect", "B不对", "B 错误", "It has A and a half"),
    ],
    "AB": [
        *("A and B", "A, B", "AB", "A & B", "A und B", "A和B", "Both A and B"),
        *("The answer is A and B", "A; B", "B, A", "A) B)", "(A)(B)", "A, B.", "A/B", "A B"),
        *("A。B", "(A) (B)", "A? B?"),
    ],
    "ABC": [
        *("A) B) C)", "A, B and C", "ABC", "A. B. C."),
    ],
}
CASES = [(text, letters) for letters, texts in NAMED.items() for text in texts]


def one(prediction, *accepted):
    return METRICS["choice"]([prediction], [list(accepted)])[0]


@pytest.mark.parametrize(("text", "letters"), CASES)
def test_the_letters_that_a_text_names(text, letters):
    assert "".join(sorted(read_option(text).letters)) == letters
    assert one(text, text) == 1
    for option in "ABCDEFGHI":
        right = letters == option or text.strip() == option
        for answer in (option, f"({option})", f"{option}.", f"{option}. xyz"):
            assert one(text, answer) == right, answer


def test_several_letters_are_asked_for_by_name():
    for answer in ("A, C", "A and C", "AC", "(A) (C)"):
        for right in ("A, C", "C and A", "AC", "The answer is A and C.", "答案是A和C"):
            assert one(right, answer) == 1, (right, answer)
        for wrong in ("A", "C", "A or C", "A, B, C", "B and C"):
            assert one(wrong, answer) == 0, (wrong, answer)


BESIDE = [
    *(("The answer is B. cat", "cat", 1), ("B. cat\nBecause it purrs.", "cat", 1)),
    *(("cat (B)", "cat", 1), ("Answer: cat", "B. cat", 1), ("\\boxed{B. cat}", "cat", 1)),
    *(("B cat", "B. cat", 1), ("A cat", "B. a cat", 1), ("答案：猫", "猫", 1)),
    *(("A or B", "B. cat", 0), ("B or a cat", "cat", 0), ("C. cat", "B. cat", 0)),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), BESIDE)
def test_texts_beside_letters(prediction, answer, score):
    assert one(prediction, answer) == score


@pytest.mark.parametrize(
    "part", ["*", "(", "A ", "A,", "no, ", "the answer is ", "\\boxed{", "答案"]
)
def test_long_texts_are_read_in_no_time(part):
    started = time.process_time()
    read_option(part * (100_000 // len(part)))
    assert time.process_time() - started < 10
