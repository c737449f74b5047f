"""The numbers of the paper (Wang et al. 2020, arXiv 2006.04768) that ours are printed beside."""

# Table 2: (N, model) -> accuracy in percent after pretraining on BookCorpus and Wikipedia and fine-tuning.
TABLE_2: dict[tuple[int, str], dict[str, float]] = {
    row[:2]: dict(zip(("sst2", "imdb", "qnli", "qqp"), row[2:], strict=True))
    for row in (
        (512, "RoBERTa-base", 93.1, 94.1, 90.9, 90.9),
        (512, "Linformer, K = 128", 92.4, 94.0, 90.4, 90.2),
        (512, "Linformer, K = 128, shared kv", 93.4, 93.4, 90.3, 90.3),
        (512, "Linformer, K = 128, shared kv, shared layer", 93.2, 93.8, 90.1, 90.2),
        (512, "Linformer, K = 256", 93.2, 94.0, 90.6, 90.5),
        (512, "Linformer, K = 256, shared kv", 93.3, 93.6, 90.6, 90.6),
        (512, "Linformer, K = 256, shared kv, shared layer", 93.1, 94.1, 91.2, 90.8),
        (512, "BERT-base", 92.7, 93.5, 91.8, 89.6),
        (512, "DistilBERT", 91.3, 92.8, 89.2, 88.5),
        (1024, "Linformer, K = 256", 93.0, 93.8, 90.4, 90.4),
        (1024, "Linformer, K = 256, shared kv", 93.0, 93.6, 90.3, 90.4),
        (1024, "Linformer, K = 256, shared kv, shared layer", 93.2, 94.2, 90.8, 90.5),
    )
}
# Table 3 of the paper: (time saved, memory saved) in inference against a transformer, by N and K, on a 16 GB V100.
TABLE_3: dict[int, dict[int, tuple[float, float]]] = {
    512: {128: (1.5, 1.7), 256: (1.3, 1.5)},
    1024: {128: (1.7, 3.0), 256: (1.6, 2.9), 512: (1.3, 1.8)},
    2048: {128: (2.6, 6.1), 256: (2.4, 5.6), 512: (2.1, 3.6), 1024: (1.3, 2.0)},
    4096: {128: (3.4, 14), 256: (3.2, 13), 512: (2.8, 8.3), 1024: (2.2, 4.3), 2048: (1.3, 2.3)},
    8192: {128: (5.5, 28), 256: (5.0, 26), 512: (4.4, 17), 1024: (3.5, 8.5), 2048: (2.1, 4.5)},
    16384: {128: (8.6, 56), 256: (7.8, 48), 512: (7.0, 32), 1024: (5.6, 16), 2048: (3.3, 8)},
    32768: {128: (13, 56), 256: (12, 48), 512: (11, 36), 1024: (8.8, 18), 2048: (5.0, 16)},
    65536: {128: (20, 60), 256: (18, 52), 512: (16, 40), 1024: (14, 20), 2048: (7.9, 18)},
}
