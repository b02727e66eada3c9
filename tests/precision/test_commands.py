"""How a command of precision/ ends when nobody reads its output."""

import subprocess
import sys
from pathlib import Path

from tests.support import ROOT, table_rows


def test_output_that_nobody_takes_and_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text('{"x\\udcff": {"1": {"answer": "A"}}}')
    (tmp_path / "side.json").write_text('{"1": {"output_sequence": ["A"], "dataset": "x\\udcff"}}')
    script = str(ROOT / "precision" / "videobench" / "precision_test.py")
    sides = [f"--eval_{side}_path={tmp_path / 'side.json'}" for side in ("npu", "gpu")]
    command = [sys.executable, script, *sides, f"--sampling_answer_path={tmp_path / 'answers.json'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and [r"x\udcff", "1"] in [row[:2] for row in table_rows(done.stdout)], done.stderr
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: stdout could not be used: No space left on device\n"
    gone = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert gone.stdout is not None and gone.stderr is not None
    gone.stdout.close()
    assert gone.stderr.read() == "" and gone.wait() == 141
    gone.stderr.close()
