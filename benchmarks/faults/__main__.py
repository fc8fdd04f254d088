"""A seeded campaign of faults over every stage: kills, signals, damaged files, full disks, twins.

    python -m benchmarks.faults --cases 0:200 --work /tmp/faults

Case ``n`` is the same in every run. After each one it is checked that

- the exit code and the last line say what happened, and there is no traceback in wrong input;
- inputs are what they were, and nothing looks like a result that is not one;
- the same command then succeeds, resumed or anew, with the identity of an undisturbed run;
- no process and no temporary file is left.

A line per case goes to ``<work>/cases.jsonl``; cases that stand there are not run again. The table
at the end counts by fault.
"""

import argparse
import json
import signal
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.campaign import Campaign
from benchmarks.faults.commands import LAYOUTS
from benchmarks.faults.kinds import FAULTS, run_case


def table(cases: list[dict[str, Any]]) -> str:
    """Cases by fault: how many, on how many ranks, exit codes, how many went wrong."""
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        by_fault[case["fault"]].append(case)
    rows = [
        "| Fault | Cases | 1 rank | TP2 | PP2 | Exit codes | Wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        found = by_fault[fault]
        layouts = Counter(case["layout"] for case in found)
        codes = Counter(str(case["code"]) for case in found)
        said = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
        wrong = sum(bool(case["wrong"]) for case in found)
        counts = " | ".join(str(layouts[name]) for name in LAYOUTS)
        rows.append(f"| {fault} | {len(found)} | {counts} | {said} | {wrong} |")
    wrong = sum(bool(case["wrong"]) for case in cases)
    rows.append(f"| all | {len(cases)} | | | | | {wrong} |")
    return "\n".join(rows)


def main() -> int:
    """Run the cases that are not done yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="0:200", help="first:stop")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(".faults"))
    parser.add_argument("--again", action="store_true", help="run again those that went wrong")
    args = parser.parse_args()
    # A shell ignores Ctrl-C for what it starts in the background, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, stop = map(int, args.cases.split(":"))
    campaign = Campaign(args.work, [sys.executable, "-m", "nemo_minitron"], args.seed)
    record = campaign.work / "cases.jsonl"
    lines = record.read_text().splitlines() if record.is_file() else []
    done = {case["number"]: case for case in map(json.loads, lines)}
    for number in range(first, stop):
        if number in done and not (args.again and done[number]["wrong"]):
            continue
        case = run_case(campaign, number)
        done[number] = asdict(case)
        with record.open("a") as file:
            file.write(json.dumps(done[number]) + "\n")
        what = f"{case.fault}, {case.stage} on {case.layout}, at {case.moment:.2f}"
        sys.stdout.write(f"{number}: {what}: {case.code} {case.wrong or 'right'}\n")
        sys.stdout.flush()
    chosen = [done[number] for number in range(first, stop) if number in done]
    sys.stdout.write(table(chosen) + "\n")
    return int(any(case["wrong"] for case in chosen))


if __name__ == "__main__":
    sys.exit(main())
