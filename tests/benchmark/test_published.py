"""The paper's numbers have the order that the paper reports: a cell in the wrong place would break it."""

import itertools

from linformer_hf.benchmark.published import TABLE_2, TABLE_3


def test_every_k_of_table_3_is_a_power_of_two_up_to_half_of_n():
    for n, row in TABLE_3.items():
        assert list(row) == [k for k in (128, 256, 512, 1024, 2048) if k <= n / 2]
    assert list(TABLE_3) == [2**power for power in range(9, 17)]


def test_more_is_saved_the_longer_the_input_and_the_smaller_k():
    for row in TABLE_3.values():
        for (time, memory), (less_time, less_memory) in itertools.pairwise(row.values()):
            assert time > less_time
            assert memory > less_memory
    for k in TABLE_3[65536]:
        column = [row[k] for row in TABLE_3.values() if k in row]
        for (time, memory), (more_time, more_memory) in itertools.pairwise(column):
            assert time < more_time
            assert memory <= more_memory
    assert min(min(cell) for row in TABLE_3.values() for cell in row.values()) > 1


def test_table_2_has_every_sharing_of_both_k_at_512_and_of_the_larger_at_1024():
    sharings = ("", ", shared kv", ", shared kv, shared layer")
    linformers = [
        (n, f"Linformer, K = {k}{sharing}") for n, k in ((512, 128), (512, 256), (1024, 256)) for sharing in sharings
    ]
    others = [(512, name) for name in ("RoBERTa-base", "BERT-base", "DistilBERT")]
    assert set(TABLE_2) == {*linformers, *others}
    for row in TABLE_2.values():
        assert list(row) == ["sst2", "imdb", "qnli", "qqp"]
        assert all(88 < accuracy < 95 for accuracy in row.values())
        assert row["qnli"] < row["sst2"] < row["imdb"] + 0.05
    mean = {key: sum(row.values()) / 4 for key, row in TABLE_2.items()}
    # The paper's finding: one projection for all layers, K = 256, is the best of its own and above RoBERTa.
    best = max(linformers[:6], key=mean.get)
    assert best == (512, "Linformer, K = 256, shared kv, shared layer")
    assert mean[best] > mean[512, "RoBERTa-base"]
