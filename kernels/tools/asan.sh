#!/bin/sh
# Runs the kernels' tests with the compiled part under Address- and UndefinedBehaviourSanitizer.
set -eu
python=${1:-.venv/bin/python}
build=build/kernels-asan
cmake -S kernels -B "$build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGAINLENS_SANITIZE=ON \
  -DPython_EXECUTABLE="$(pwd)/$python"
cmake --build "$build" -j 2
# Python itself is not instrumented: the runtime has to be there first, and its own leaks are not
# ours. A finding ends the process, so the tests fail.
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
GAINLENS_KERNELS_NATIVE="$(pwd)/$build/_native.abi3.so" \
  "$python" -m pytest tests/kernels/test_values.py tests/kernels/test_special.py \
  tests/kernels/test_threads.py -p no:xdist \
  -k "not no_second_openmp and not strides_beyond and not without_the_compiled"
