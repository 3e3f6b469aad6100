"""The paper's numbers (arXiv 2509.19170v2, CC-BY 4.0), for `--compare paper`.

Tables 3 to 5 hold all six inference settings, table 2 the sets out of domain; means over three
seeds where a model was trained. A row is `MODEL DATA TRAINING`, `MODEL none` without training.
"""

from __future__ import annotations

MODELS = {
    "L3B": "Llama-3.2-3B-Instruct",
    "L8B": "Llama-3.1-8B-Instruct",
    "Q3B": "Qwen2.5-3B-Instruct",
}
COLUMNS = (
    ("hard-greedy", 1),
    ("hard-sample", 1),
    ("hard-sample", 32),
    ("fuzzy-greedy", 1),
    ("fuzzy-sample", 1),
    ("fuzzy-sample", 32),
    ("soft-greedy", 1),
    ("soft-sample", 1),
    ("soft-sample", 32),
)
"""(inference setting, k of pass@k), in per cent."""
OOD_COLUMNS = (
    ("hellaswag", "accuracy"),
    ("hellaswag", "nll_per_token"),
    ("arc_challenge", "accuracy"),
    ("arc_challenge", "nll_per_token"),
    ("mmlu", "accuracy"),
    ("mmlu", "nll_per_token"),
)
"""Accuracy in per cent, NLL per token of the correct answer in nats. The paper says "ARC" without
the part."""

GSM8K = """
L3B none               71.4  45.0  96.8  70.5  69.3  93.9  68.4  65.2  94.9
L3B gsm8k hard         75.9  74.3  94.1  75.5  74.7  92.3  75.7  74.2  92.6
L3B gsm8k fuzzy        76.7  66.4  97.4  76.4  75.2  92.0  75.1  73.5  93.5
L3B gsm8k soft         77.2  70.5  97.9  76.8  76.0  93.4  74.5  74.1  94.2
L3B math hard          80.0  79.7  96.7  80.1  78.9  95.3  79.5  78.6  95.5
L3B math fuzzy         79.6  68.5  97.6  78.8  78.1  95.2  77.9  75.9  95.7
L3B math soft          76.8  70.8  97.8  76.9  76.2  94.6  76.3  74.8  95.3
L3B deepscaler hard    79.7  79.5  96.6  79.6  78.9  94.7  79.8  78.5  94.8
L3B deepscaler fuzzy   78.8  69.6  97.7  78.3  77.2  94.8  76.5  75.4  95.3
L3B deepscaler soft    77.9  71.0  98.0  77.5  76.9  94.4  77.5  75.5  95.2
L8B none               82.6  64.9  98.5  82.6  69.3  96.1  81.2  63.8  96.1
L8B gsm8k hard         81.2  80.6  95.1  80.0  69.0  94.5  78.3  68.3  94.3
L8B gsm8k fuzzy        83.7  73.2  98.2  83.4  73.5  95.5  82.3  69.8  95.5
L8B gsm8k soft         82.6  73.3  98.3  82.4  72.9  95.2  81.6  69.0  95.6
Q3B none                8.9  17.2  95.1  10.5  11.5  58.5   8.6  13.8  71.9
Q3B math hard          84.0  82.9  97.2  84.0  83.2  94.6  84.0  83.0  94.9
Q3B math fuzzy         84.4  81.6  98.1  84.1  84.2  94.3  84.0  84.1  95.0
Q3B math soft          82.9  78.7  97.6  82.5  82.1  94.8  82.9  81.9  95.4
"""
MATH500 = """
L3B none               38.0  25.2  82.0  37.8  34.9  78.4  37.2  33.1  79.2
L3B gsm8k hard         34.6  31.2  72.4  34.6  32.7  71.6  33.2  32.1  70.1
L3B gsm8k fuzzy        42.6  32.6  83.2  41.6  41.2  79.5  40.3  38.7  79.5
L3B gsm8k soft         43.5  37.0  84.8  44.2  42.5  78.1  42.0  40.7  79.6
L3B math hard          49.1  47.9  78.7  49.7  47.0  76.5  48.1  46.8  76.3
L3B math fuzzy         48.5  37.5  81.5  47.4  46.9  79.7  45.6  44.8  79.9
L3B math soft          44.5  39.1  82.2  45.1  43.4  79.3  43.2  42.0  80.2
L3B deepscaler hard    49.6  48.3  78.1  49.2  47.9  77.7  50.0  47.4  77.7
L3B deepscaler fuzzy   46.5  38.5  83.3  46.0  45.3  79.8  45.8  43.5  78.9
L3B deepscaler soft    44.7  37.4  80.6  44.6  42.8  78.5  40.9  41.3  77.9
L8B none               44.4  31.1  79.8  45.2  32.2  78.6  42.4  29.3  73.6
L8B gsm8k hard         20.2  19.8  45.4  20.8   9.7  32.3  20.0   9.7  32.2
L8B gsm8k fuzzy        44.6  33.7  83.1  45.1  33.9  75.9  43.7  31.1  75.7
L8B gsm8k soft         44.7  34.8  83.9  44.3  33.9  76.9  44.3  31.0  75.4
Q3B none               29.0  25.5  81.0  27.6  28.1  69.0  27.0  29.6  73.6
Q3B math hard          59.0  57.1  83.6  58.9  57.5  79.9  58.3  57.1  80.2
Q3B math fuzzy         58.1  55.5  84.4  58.4  57.9  79.1  58.0  57.7  80.3
Q3B math soft          54.7  52.2  84.4  54.9  54.3  79.1  54.7  54.6  80.3
"""
OLYMPIADBENCH = """
L3B none               17.9  12.0  52.3  18.4  15.4  53.2  14.4  14.7  52.4
L3B gsm8k hard         10.6   9.4  39.3  11.0  10.1  39.1  11.1   9.8  38.0
L3B gsm8k fuzzy        17.4  13.0  55.2  17.6  16.4  55.3  15.5  15.5  55.2
L3B gsm8k soft         18.9  15.5  58.6  19.3  18.2  57.5  17.4  16.9  57.5
L3B math hard          22.7  22.2  49.3  22.2  22.1  48.5  22.7  21.9  48.0
L3B math fuzzy         21.6  15.9  52.8  21.2  21.0  55.4  19.9  19.6  56.2
L3B math soft          19.2  16.6  55.8  20.2  19.5  53.5  19.9  18.2  53.9
L3B deepscaler hard    23.2  23.8  50.8  23.0  23.7  49.4  24.0  23.3  49.0
L3B deepscaler fuzzy   19.5  16.6  54.4  20.7  19.7  53.1  20.5  18.5  53.8
L3B deepscaler soft    21.0  16.4  53.3  18.9  19.5  53.2  18.4  18.0  51.5
L8B none               19.6  11.7  52.6  18.7  12.8  46.4  15.7  11.5  48.3
L8B gsm8k hard          3.8   3.4  16.4   3.8   1.2   7.6   3.9   1.0   6.7
L8B gsm8k fuzzy        18.0  12.5  56.0  17.9  14.1  52.5  18.1  13.0  51.5
L8B gsm8k soft         17.9  13.1  56.8  18.7  13.8  53.0  17.1  13.0  51.1
Q3B none               16.9  14.3  50.2  17.3  16.4  40.6  17.3  16.7  45.3
Q3B math hard          29.4  27.8  61.1  29.6  28.6  57.2  29.1  28.3  55.7
Q3B math fuzzy         27.2  24.4  60.7  27.4  27.1  54.0  27.2  26.6  55.4
Q3B math soft          24.3  22.0  58.5  22.8  23.9  53.2  23.1  23.5  54.9
"""
OOD = """
L3B none              66.46  2.53 72.79  2.86 60.85  1.61
L3B math hard         66.20  2.57 73.45  3.19 61.11  1.65
L3B math fuzzy        67.00  2.53 73.25  2.88 61.16  1.60
L3B math soft         67.12  2.53 72.76  2.92 61.20  1.59
L3B deepscaler hard   66.18  2.58 73.99  3.18 60.66  1.66
L3B deepscaler fuzzy  66.88  2.55 73.05  2.94 61.20  1.60
L3B deepscaler soft   66.48  2.56 72.85  2.93 60.34  1.68
L3B gsm8k hard        66.44  2.57 73.53  3.16 61.48  1.65
L3B gsm8k fuzzy       66.97  2.53 73.10  2.89 61.30  1.60
L3B gsm8k soft        67.13  2.53 72.99  2.89 61.36  1.59
L8B none              74.24  2.34 81.20  2.82 69.00  1.40
L8B gsm8k hard        74.44  2.37 81.49  3.13 68.90  1.41
L8B gsm8k fuzzy       74.41  2.35 81.63  2.81 68.90  1.40
L8B gsm8k soft        74.32  2.35 81.46  2.82 68.78  1.40
Q3B none              74.94  2.29 83.00  4.67 68.08  1.19
Q3B math hard         75.01  2.30 82.86  5.62 67.86  1.51
Q3B math fuzzy        75.07  2.29 83.00  4.74 68.16  1.21
Q3B math soft         75.25  2.30 83.12  5.49 68.01  1.33
"""
TABLES = {"gsm8k": GSM8K, "math500": MATH500, "olympiadbench": OLYMPIADBENCH}


def trained_on(model: str) -> list[str]:
    """The training sets of a model in the paper's tables."""
    rows = (row.split() for row in _rows(GSM8K))
    return list(dict.fromkeys(words[1] for words in rows if words[0] == model and len(words) == 3))


def require_training(model: str, data: str) -> None:
    """Raise ValueError for a training that the paper did not do, naming those that it did."""
    if data not in trained_on(model):
        known = "; ".join(f"{m} on {', '.join(trained_on(m))}" for m in MODELS)
        raise ValueError(
            f"the paper did not train {model} on {data}; it trained {known}. Choose --paper-model "
            "and --paper-data from these"
        )


def row_name(model: str, data: str, training: str) -> str:
    """A row's name in the paper's tables."""
    return f"{model} none" if training == "none" else f"{model} {data} {training}"


def cell(task: str, row: str, setting: str, k: int) -> float | None:
    """pass@k in per cent; None where the paper has no such cell."""
    values = _rows(TABLES.get(task, "")).get(row)
    return (
        None
        if values is None or (setting, k) not in COLUMNS
        else (values[COLUMNS.index((setting, k))])
    )


def out_of_domain(name: str, row: str, number: str) -> float | None:
    """A number of table 2; None where the paper has none."""
    values = _rows(OOD).get(row)
    return (
        None
        if values is None or (name, number) not in OOD_COLUMNS
        else (values[OOD_COLUMNS.index((name, number))])
    )


def _rows(text: str) -> dict[str, list[float]]:
    out = {}
    for line in text.strip().splitlines():
        words = line.split()
        first = next(i for i, word in enumerate(words) if word[0].isdigit())
        out[" ".join(words[:first])] = [float(word) for word in words[first:]]
    return out
