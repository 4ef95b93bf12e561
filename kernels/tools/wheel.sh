#!/bin/sh
# Builds wheel and source distribution, installs each of them in a clean environment, and one
# more where nothing compiles. PyTorch and the other dependencies are borrowed from .venv.
set -eu
python=${1:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
borrowed=$("$python" -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])")

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install -q build
"$work/build/bin/python" -m build --outdir "$work/dist" . > "$work/log" || { cat "$work/log"; exit 1; }
CXX=/bin/false "$work/build/bin/python" -m pip wheel -q --no-deps --no-cache-dir \
  -w "$work/plain" "$work"/dist/*.tar.gz
ls "$work/dist" "$work/plain"

# Only our own two packages are installed: no top-level `kernels`, no tests.
"$python" - "$work"/dist/*.whl "$work"/plain/*.whl << 'EOF'
import sys, zipfile

for path in sys.argv[1:]:
    names = zipfile.ZipFile(path).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"gainlens", "gainlens_kernels"}, packages
    compiled = [name for name in names if name.endswith(".so")]
    assert compiled == ([] if "none-any" in path else ["gainlens_kernels/_native.abi3.so"]), compiled
    assert "gainlens_kernels/py.typed" in names
EOF

cat > "$work/check.py" << 'EOF'
import sys, warnings

expected, borrowed, home = sys.argv[1:]
# Appended, not installed: editable installs over there stay out of the way.
sys.path.append(borrowed)
import torch
import gainlens_kernels as kernels

assert kernels.__file__.startswith(home), kernels.__file__
q, k, v = torch.randn(1, 6, 5, 12), torch.randn(1, 2, 300, 12), torch.randn(1, 2, 300, 64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        out = kernels.sliced_attention(q, k, v, scale=0.3)
torch.testing.assert_close(out, kernels.reference(q, k, v, scale=0.3), rtol=1e-4, atol=1e-5)
assert kernels.backend().startswith(expected), kernels.backend()
slow = [w for w in caught if "compiled CPU kernels are not available" in str(w.message)]
assert len(slow) == (expected == "reference"), caught
print(home.rsplit("/", 1)[1], kernels.backend(), "right")
EOF

check() { # name, what to install, expected backend
  "$python" -m venv "$work/$1"
  "$work/$1/bin/python" -m pip install -q --no-deps --no-cache-dir "$2"
  (cd "$work" && "$work/$1/bin/python" -I check.py "$3" "$borrowed" "$work/$1")
}
check wheel "$(echo "$work"/dist/*.whl)" cpu
check sdist "$(echo "$work"/dist/*.tar.gz)" cpu
check nothing-compiles "$(echo "$work"/plain/*.whl)" reference
