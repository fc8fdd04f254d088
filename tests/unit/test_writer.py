"""The helper process of Megatron's checkpoint writer stays small."""

import subprocess
import sys


def test_what_the_helper_imports_is_light():
    """Each rank keeps one; it has imported the module that says what it does when it starts."""
    code = "import sys, nemo_minitron.runtime.supervise; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "megatron", "nemo", "numpy"} & set(done.stdout.split())
