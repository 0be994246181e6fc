#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""What a sanitizer would find in the pump, it finds."""

import contextlib
import io
import os
import pathlib
import subprocess
import tempfile
import unittest

from runner import sanitizer

SETUP = '''
import setuptools
setuptools.setup(name='nova', packages=[], ext_modules=[
    setuptools.Extension('nova.faulty', ['faulty.c'])])
'''
FAULTY = '''
#include <Python.h>
#include <pthread.h>

static int shared;

static void *count(void *unused)
{
    for (int i = 0; i < 1000; i++)
        shared++;
    return unused;
}

static PyObject *overrun(PyObject *self, PyObject *unused)
{
    volatile int past = 4;
    volatile char *room = malloc(past);
    char found = room[past];
    free((void *)room);
    return PyLong_FromLong(found);
}

static PyObject *overflow(PyObject *self, PyObject *unused)
{
    volatile int most = 0x7fffffff;
    return PyLong_FromLong(most + 1);
}

static PyObject *race(PyObject *self, PyObject *unused)
{
    pthread_t one, two;
    pthread_create(&one, NULL, count, NULL);
    pthread_create(&two, NULL, count, NULL);
    pthread_join(one, NULL);
    pthread_join(two, NULL);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"overrun", overrun, METH_NOARGS, NULL},
    {"overflow", overflow, METH_NOARGS, NULL},
    {"race", race, METH_NOARGS, NULL}, {NULL}};
static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "faulty", NULL, -1, methods};

PyMODINIT_FUNC PyInit_faulty(void)
{
    return PyModule_Create(&module);
}
'''
# A worker has an environment of its own, and starts with -I.
RUN = '''
import subprocess, sys
sys.exit(subprocess.run([sys.executable, '-I', '-c', """
import sys
sys.path.insert(0, %r)
from nova import faulty
faulty.%s()"""], env={}).returncode)
'''


class TestSanitizer(unittest.TestCase):

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.top = pathlib.Path(scratch.name)
        (self.top / 'nova').mkdir()
        for name, text in (('setup.py', SETUP), ('faulty.c', FAULTY),
                           ('PKG-INFO', 'Version: 1\n')):
            (self.top / name).write_text(text)

    def found(self, python, fault):
        start = pathlib.Path(sanitizer.__file__).parent / 'start'
        subprocess.run(
            [python, '-c', RUN % (str(self.top), fault)],
            stderr=subprocess.DEVNULL, env={
                **os.environ, 'PYTHONPATH': str(start),
                **sanitizer.environment(python)})
        return sanitizer.found(python.parent)

    def test_each_finds_its_own(self):
        faults = {'address': ('overrun', 'heap-buffer-overflow'),
                  'undefined': ('overflow', 'signed integer overflow'),
                  'thread': ('race', 'data race')}
        self.assertEqual(set(faults), {kind.name for kind in sanitizer.KINDS})
        for kind in sanitizer.KINDS:
            reports = self.top / kind.name
            reports.mkdir()
            with contextlib.redirect_stdout(io.StringIO()):
                python = sanitizer.prepare(
                    kind, self.top, reports, self.top)
            for name, (fault, _said) in faults.items():
                if name != kind.name:
                    self.assertEqual('', self.found(python, fault), kind)
            fault, said = faults[kind.name]
            self.assertIn(said, self.found(python, fault))
