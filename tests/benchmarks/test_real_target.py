from benchmarks.serve import real_target


def pair(source: str, base: float, drafted: float) -> dict:
    return {
        "sources": [source],
        "base_tokens": 100,
        "base_s": base,
        "drafted_tokens": 100,
        "drafted_s": drafted,
    }


def cell(drafter: str, k: int, *pairs: dict) -> dict:
    return {
        "drafter": drafter,
        "num_speculative_tokens": k,
        "concurrency": 1,
        "max_new_tokens": real_target.LONG,
        "drafts": 10 * k,
        "acceptance_by_position": [0.6, 0.3],
        "by_source": {"code": {"accepted_length": 1 + k / 2}},
        "pairs": list(pairs),
    }


CELLS = [
    cell("eagle3", 3, pair("code", 2, 1), pair("chat", 2, 2)),
    cell("dspark", 5, pair("code", 4, 1), pair("chat", 1, 2)),
    cell("ngram", 5, pair("code", 1, 1)),
]


def test_the_fastest_drafter_is_of_all_prompts_or_of_one_kind():
    assert real_target.fastest(CELLS, 1) == {"speedup": 5 / 3, "drafter": "dspark k=5", "pairs": 2}
    assert real_target.fastest(CELLS, 1, "chat")["drafter"] == "eagle3 k=3"
    assert real_target.ratio(CELLS[2], "chat") == (0.0, 0)


def test_accepted_lengths_are_those_of_heads_and_gaps_of_the_k_that_was_predicted():
    assert real_target.accepted(CELLS, 5, "code") == 3.5
    assert real_target.accepted(CELLS, 5, "maths") == 0
    heads = {"eagle3": {"k": 3, "acceptance_by_position": [0.65, 0.3]}}
    assert round(real_target.gap(CELLS, heads), 6) == 5
    assert real_target.gap(CELLS, {"eagle3": {"k": 4, "acceptance_by_position": [0.9]}}) == 0
