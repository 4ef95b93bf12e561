// The Python face: plain C API, limited to what Python 3.10 guarantees, so that one build
// serves every later Python and, since only addresses, sizes and strides cross, every PyTorch.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>

#include "plan.h"
#include "threads.h"

namespace {

std::atomic<const gk::KernelSet *> active{nullptr};

// Reads n integers of a tuple (sizes or strides).
bool read_tuple(PyObject *tuple, int64_t *out, Py_ssize_t n) {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != n) {
    PyErr_SetString(PyExc_ValueError, "expected a tuple of sizes or strides");
    return false;
  }
  for (Py_ssize_t i = 0; i < n; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
    if (out[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

bool read_pointer(PyObject *value, const void **out) {
  const unsigned long long address = PyLong_AsUnsignedLongLong(value);
  if (PyErr_Occurred()) return false;
  *out = reinterpret_cast<const void *>(static_cast<uintptr_t>(address));
  return true;
}

// attend(dtype, q, q.shape, q.stride(), k, k.shape, k.stride(), v, v.shape, v.stride(), out,
//        scale, causal, lengths or 0, starts or 0, threads) -> 0, or the 1-based batch row whose
// lengths or starts are out of range, or -1 for "sizes don't match", -2 for "out of memory".
// The output is contiguous.
PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 16) {
    PyErr_SetString(PyExc_TypeError, "attend takes 16 arguments");
    return nullptr;
  }
  gk::Problem p;
  int64_t qn[4], qs[4], kn[4], ks[4], vn[4], vs[4];
  const void *out, *lengths, *starts;
  p.dtype = int32_t(PyLong_AsLong(args[0]));
  if (!read_pointer(args[1], &p.q) || !read_tuple(args[2], qn, 4) || !read_tuple(args[3], qs, 4) ||
      !read_pointer(args[4], &p.k) || !read_tuple(args[5], kn, 4) || !read_tuple(args[6], ks, 4) ||
      !read_pointer(args[7], &p.v) || !read_tuple(args[8], vn, 4) || !read_tuple(args[9], vs, 4) ||
      !read_pointer(args[10], &out))
    return nullptr;
  p.out = const_cast<void *>(out);
  p.scale = PyFloat_AsDouble(args[11]);
  p.causal = PyObject_IsTrue(args[12]) == 1;
  if (!read_pointer(args[13], &lengths) || !read_pointer(args[14], &starts)) return nullptr;
  p.lengths = static_cast<const int64_t *>(lengths);
  p.starts = static_cast<const int64_t *>(starts);
  const long threads = PyLong_AsLong(args[15]);
  if (PyErr_Occurred()) return nullptr;

  p.batch = qn[0], p.heads = qn[1], p.tq = qn[2], p.d_qk = qn[3];
  p.kv_heads = kn[1], p.tk = kn[2], p.d_v = vn[3];
  for (int i = 0; i < 3; ++i) p.qs[i] = qs[i], p.ks[i] = ks[i], p.vs[i] = vs[i];
  p.os[2] = p.d_v, p.os[1] = p.tq * p.d_v, p.os[0] = p.heads * p.os[1];
  const bool matching = p.dtype >= 0 && p.dtype <= 2 && p.kv_heads > 0 && p.heads > 0 &&
                        p.heads % p.kv_heads == 0 && kn[0] == p.batch && vn[0] == p.batch &&
                        vn[1] == p.kv_heads && vn[2] == p.tk && kn[3] == p.d_qk && p.tk > 0 &&
                        p.d_qk >= 1 && p.d_qk <= 256 && p.d_v >= 1 && p.d_v <= 256 &&
                        (qs[3] == 1 || p.d_qk == 1) && (ks[3] == 1 || p.d_qk == 1) &&
                        (vs[3] == 1 || p.d_v == 1) && p.batch >= 0 && p.tq >= 0;
  if (!matching) return PyLong_FromLong(-1);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t begin = p.key_begin(b), end = p.key_end(b);
    if (begin < 0 || end > p.tk || begin > p.tk || end < 0) return PyLong_FromLongLong(b + 1);
  }
  if (p.batch == 0 || p.tq == 0) return PyLong_FromLong(0);

  const gk::KernelSet *const kernels = active.load();
  bool done;
  Py_BEGIN_ALLOW_THREADS
  done = gk::run_problem(p, *kernels, threads < 1 ? 1 : threads > 1024 ? 1024 : int(threads));
  Py_END_ALLOW_THREADS
  return PyLong_FromLong(done ? 0 : -2);
}

struct ReadJob {
  const float *data;
  int64_t n, ahead, parts;
  std::atomic<int64_t> next{0};
  std::atomic<float> sum{0.0f};
};

void read_part(void *context) {
  ReadJob &job = *static_cast<ReadJob *>(context);
  for (int64_t i; (i = job.next.fetch_add(1)) < job.parts;) {
    const int64_t a = job.n / job.parts * i, b = i + 1 == job.parts ? job.n : a + job.n / job.parts;
    const float sum = active.load()->read(job.data + a, b - a, job.ahead);
    float before = job.sum.load();
    while (!job.sum.compare_exchange_weak(before, before + sum)) {
    }
  }
}

// read_floats(address, count, prefetch distance in bytes, threads) -> their sum.
PyObject *read_floats(PyObject *, PyObject *const *args, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "read_floats takes 4 arguments");
    return nullptr;
  }
  ReadJob job;
  const void *data;
  if (!read_pointer(args[0], &data)) return nullptr;
  job.data = static_cast<const float *>(data);
  job.n = PyLong_AsLongLong(args[1]);
  job.ahead = PyLong_AsLongLong(args[2]);
  const long threads = PyLong_AsLong(args[3]);
  job.parts = 16 * threads;
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  gk::run_parallel(int(threads), read_part, &job);
  Py_END_ALLOW_THREADS
  return PyFloat_FromDouble(job.sum.load());
}

PyObject *use_openmp(PyObject *, PyObject *address) {
  const void *pointer;
  if (!read_pointer(address, &pointer)) return nullptr;
  gk::set_openmp(const_cast<void *>(pointer));
  Py_RETURN_NONE;
}

PyObject *thread_backend(PyObject *, PyObject *) {
  return PyUnicode_FromString(gk::thread_backend());
}

PyObject *instruction_set(PyObject *, PyObject *) {
  return PyUnicode_FromString(active.load()->name);
}

PyObject *set_instruction_set(PyObject *, PyObject *name) {
  PyObject *const bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const char *const text = PyBytes_AsString(bytes);
  const gk::KernelSet *const set = text ? gk::kernels_named(text) : nullptr;
  Py_DECREF(bytes);
  if (set) active.store(set);
  return PyBool_FromLong(set != nullptr);
}

// METH_FASTCALL functions have another type than PyCFunction; the cast through void(*)() is
// the documented way to store them.
PyCFunction fastcall(PyObject *(*f)(PyObject *, PyObject *const *, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"attend", fastcall(attend), METH_FASTCALL, "Run one problem given by addresses."},
    {"read_floats", fastcall(read_floats), METH_FASTCALL, "Sum floats: the read ceiling."},
    {"use_openmp", use_openmp, METH_O, "Run on the OpenMP runtime whose GOMP_parallel is here."},
    {"thread_backend", thread_backend, METH_NOARGS, "'openmp' or 'pool'."},
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the kernels in use."},
    {"set_instruction_set", set_instruction_set, METH_O,
     "Use the kernels of this name; False where this processor cannot."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_native",
                          "Sliced attention in C++.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  active.store(gk::best_kernels());
  return PyModule_Create(&definition);
}
