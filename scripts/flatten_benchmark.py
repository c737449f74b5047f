"""Rewrite results.json of benchmarks made before rows had fields: `python scripts/flatten_benchmark.py FILE ...`.

A row held the cases of a whole group, named `linformer_hf, K = 256`. Now each case is a row with `encoder` and `k`. No
number changes; a file in the new form is left alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from linformer_hf.utils.files import SUM_KEY, read_json, write_json


def rows_of(group: dict[str, Any]) -> list[dict[str, Any]]:
    group = dict(group)
    cases, failed = group.pop("cases"), group.pop("failed", {})
    differences, unfit = group.pop("difference_from_plain", {}), group.pop("fails_check", [])
    rows = []
    for name, case in [*cases.items(), *((name, {"failed": text}) for name, text in failed.items())]:
        encoder, _, k = name.partition(", K = ")
        rows.append({**group, "encoder": encoder, "k": int(k) if k else None, **case})
        if name in differences:
            rows[-1] |= {"difference_from_plain": differences[name], "fails_check": name in unfit}
    return rows


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        content = read_json(path, "Take it from a copy.", ("timings", "memory"))
        for part in ("timings", "memory"):
            if any("cases" in row for row in content[part]):
                content[part] = [row for group in content[part] for row in rows_of(group)]
        had_sum = SUM_KEY in json.loads(path.read_text(encoding="utf-8"))
        if had_sum:
            write_json(path, content)
        else:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
