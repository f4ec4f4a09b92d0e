"""A report with one of everything, and titles that try to break out of it."""

from __future__ import annotations

from rella.report.contents import (
    Chart,
    Column,
    Heat,
    HeatRow,
    Point,
    Report,
    Row,
    Section,
    Series,
    Table,
    Value,
)

HOSTILE = "<script>alert(1)</script> & \"double\" 'single' | pipe `tick` $5 and $6"
PATH = "/storage/experiments/" + "a-very-long-folder-name-without-spaces/" * 6 + "model.safetensors"

COLUMNS = (
    Column("auc", "AUC", better="high"),
    Column("log_loss", "Log Loss", better="low"),
    Column("accuracy", "ACC", better="high"),
    Column("gain", "Rel. Impr.", form=".2%"),
    Column("rows", "Rows", form=",.0f"),
    Column("remark", "Remark"),
)


def _row(title: str, auc: float, loss: float, group: str, **more: object) -> Row:
    cells = {
        "auc": Value(auc, spread=0.0011, paper=auc - 0.0021, star=bool(more.get("star"))),
        "log_loss": Value(loss, spread=0.0009, paper=loss + 0.0034),
        "accuracy": Value(auc - 0.07, spread=0.0013),
        "rows": Value(70_000),
        "remark": more.get("remark"),
    }
    return Row(title, {key: cell for key, cell in cells.items() if cell is not None}, group, more.get("ranked", True))


TABLE2 = Table(
    "table2",
    "Table 2: overall performance",
    "MovieLens-1M, test split, 200,000 rows, Vicuna-7B, K = 30, N = 8,192 (10 %), seeds 0, 1, 2.",
    COLUMNS,
    (
        _row("DeepFM", 0.7842, 0.5517, "Full-shot"),
        _row("AutoInt", 0.7842, 0.5521, "Full-shot"),
        _row("SIM", 0.7922, 0.5448, "Full-shot", remark="best baseline"),
        _row("Vicuna-7B, zero-shot", 0.6993, 0.6291, "Zero-shot", ranked=False),
        _row("ReLLa (few-shot)", 0.8033, 0.5324, "Few-shot", star=True, remark="70k of 800k rows"),
        Row(HOSTILE, {"auc": Value(0.7712), "remark": "<img src=x onerror=alert(2)>"}, "Few-shot"),
    ),
    notes=("* p < 0.01, paired bootstrap over users against the best baseline.", "Seeds share their retrieval."),
)

TABLE3 = Table(
    "table3",
    "Table 3: ablation",
    "BookCrossing, test split, K = 60, N = 1,024.",
    COLUMNS[:3],
    (
        Row("ReLLa", {"auc": Value(0.7482, spread=0.0021, seeds=(0.7461, 0.7482, 0.7503), paper=0.7482)}),
        Row("w/o retrieval", {"auc": Value(0.7391, seeds=(0.7371, 0.7391, 0.7411), paper=0.7434)}),
        Row("w/o mixture", {}),
    ),
)

SHOTS = Chart(
    "figure5",
    "AUC by number of shots",
    "MovieLens-1M, test split; baselines trained on the same rows.",
    "N",
    "AUC",
    (
        Series(
            "ReLLa",
            [
                Point(n, 0.7031 + 0.0083 * i, spread=0.0021, label=f"{n} rows" if n else "zero-shot")
                for i, n in enumerate((0, 64, 256, 1024, 4096, 16384, 65536))
            ],
            paper=[Point(n, 0.7102 + 0.0079 * i) for i, n in enumerate((64, 256, 1024, 4096, 16384, 65536))],
        ),
        Series("SIM", [Point(n, 0.6512 + 0.0171 * i) for i, n in enumerate((64, 256, 1024, 4096, 16384, 65536))]),
        Series("Vicuna", [Point(n, 0.6902 + 0.0042 * i) for i, n in enumerate((64, 256, 1024))], dashed=True),
    ),
    log_x=True,
    level=("SIM, all rows", 0.7922),
)

LENGTHS = Chart(
    "figure4",
    "AUC by length of history",
    HOSTILE,
    "K",
    "AUC",
    tuple(
        Series(title, [Point(k, 0.61 + 0.02 * n + 0.003 * i + 0.0012, 0.004) for i, k in enumerate(range(5, 65, 5))])
        for n, title in enumerate(("ReLLa", "SIM", "DIN", "DIEN", "GRU4Rec", "Caser", "SASRec", HOSTILE, "PNN"))
    ),
)

CALIBRATION = Chart(
    "calibration",
    "Calibration",
    "Ten bins of equal size.",
    "Mean prediction",
    "Share of clicks",
    (Series("ReLLa", [Point(0.05 + 0.1 * i, 0.07 + 0.0931 * i, label=f"{1000 - i} rows") for i in range(10)]),),
    diagonal=True,
    notes=("Expected calibration error 0.0123.",),
)

MOVIES = (
    "Toy Story (1995)",
    "M*A*S*H (1970)",
    "One Flew Over the Cuckoo's Nest (1975)",
    "Star Wars: Episode V - The Empire Strikes Back (1980)",
    "Amélie (Le Fabuleux destin d'Amélie Poulain) (2001)",
    HOSTILE,
)

ATTENTION = Heat(
    "figure8",
    "Attention to the history",
    "User 4169, last layer, mean over heads; the rightmost film is the target.",
    tuple(
        HeatRow(title, [MOVIES[i % 6] for i in range(30)], [((i * step) % 31) / 31.7 + 0.0137 for i in range(30)])
        for title, step in (("ReLLa", 7), ("w/o retrieval", 11), (HOSTILE, 13))
    ),
)

SHORT = Heat("figure8b", "A short history", "", (HeatRow("ReLLa", MOVIES[:4], (0.0, 0.1, 0.31, 0.62)),))

REPORT = Report(
    "ReLLa on MovieLens-1M and BookCrossing",
    "Tables and figures of the paper, from the predictions of one run.",
    (
        ("Model", "Vicuna-7B v1.3, LoRA r = 8"),
        ("Data", "MovieLens-1M"),
        ("Hardware", "8 × V100 32 GB"),
        ("Training", "5 epochs, batch 256, learning rate 1e-3"),
        ("Storage", PATH[:90]),
        ("Seeds", "0, 1, 2"),
        ("Remark", HOSTILE),
    ),
    (
        Section(
            "Performance",
            "Every number is computed from the stored predictions.\n\nThe paper's numbers stand beside.",
            (TABLE2, TABLE3),
        ),
        Section("Curves", "", (SHOTS, LENGTHS, CALIBRATION)),
        Section(HOSTILE, HOSTILE, (ATTENTION, SHORT)),
    ),
    (("Checkpoint", PATH), (HOSTILE, "s3://bucket/" + "x" * 300)),
)
