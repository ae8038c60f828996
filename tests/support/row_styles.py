"""One row in several styles, and what a row means."""


def meaning(example):
    return example.messages, example.compute_digest(), example.accepted


LLAVA = {
    "image": "red.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a box"},
    ],
}

PLAIN = {"prompt": "What is it?", "answer": "a box"}
