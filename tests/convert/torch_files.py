"""Writes files as `torch.save` does, without PyTorch, so that every test of reading them runs everywhere.

`save` pickles NumPy arrays as tensors under PyTorch's own names, and with `modules` objects of made-up classes under the
names of OmegaConf's and transformers', as the reference's Lightning checkpoints hold them.
"""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import jax
import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def _class(module, name, function=False):
    made = (lambda *a: None) if function else type(name, (), {})
    made.__module__, made.__qualname__, made.__name__ = module, name, name
    return made


@contextmanager
def modules(*names):
    """Makes `module:name` importable, as pickling asks for, and takes it away again."""
    before = {}
    made = {}
    for full in names:
        module, name = full.split(":")
        parts = module.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[: i + 1])
            if path not in before:
                before[path] = sys.modules.get(path)
                sys.modules[path] = types.ModuleType(path)
        made[name] = _class(module, name, function=name.startswith("_rebuild"))
        setattr(sys.modules[module], name, made[name])
    try:
        yield made
    finally:
        for path, module in before.items():
            if module is None:
                del sys.modules[path]
            else:
                sys.modules[path] = module


class _Storage:
    def __init__(self, array, key):
        self.array, self.key = array, key

    def append(self, array):
        """Puts more numbers at the end, and returns where they begin."""
        begin = self.array.size
        self.array = np.concatenate([self.array.ravel(), array.ravel()])
        return begin


class _Tensor:
    """What pickles as a tensor; a view keeps its strides."""

    def __init__(self, storage, offset, shape, strides, rebuild):
        self.storage, self.offset, self.shape, self.strides, self.rebuild = storage, offset, shape, strides, rebuild

    def __reduce__(self):
        return self.rebuild, (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())


class _Parameter:
    """What pickles as a parameter, of which a tensor is the data."""

    def __init__(self, tensor, rebuild):
        self.tensor, self.rebuild = tensor, rebuild

    def __reduce__(self):
        return self.rebuild, (self.tensor, True, OrderedDict())


def save(root, path, transposed=(), together=(), parameters=(), byteorder="little"):
    """Writes `root`, a nest of dicts and lists with NumPy arrays, as `torch.save` would.

    Args:
        root: the object.
        path: of the file.
        transposed: keys whose two-dimensional tensors are views of their transposes.
        together: keys whose tensors are parts of one storage.
        parameters: keys whose tensors are parameters.
        byteorder: what the file says of the machine that wrote it.
    """
    names = [f"torch:{name}" for name in STORAGES.values()] + [
        "torch._utils:_rebuild_tensor_v2",
        "torch._utils:_rebuild_parameter",
    ]
    with modules(*names) as made:
        storages, shared = [], []

        def convert(value, key=None):
            if isinstance(value, np.ndarray):
                array = np.ascontiguousarray(value.T if key in transposed else value)
                strides = tuple(stride // value.itemsize for stride in array.strides)
                strides = strides[::-1] if key in transposed else strides
                if key in together and shared:
                    storage, offset = shared[0], shared[0].append(array)
                else:
                    storage, offset = _Storage(array, str(len(storages))), 0
                    storages.append(storage)
                    shared.extend([storage] if key in together else [])
                tensor = _Tensor(storage, offset, value.shape, strides, made["_rebuild_tensor_v2"])
                return _Parameter(tensor, made["_rebuild_parameter"]) if key in parameters else tensor
            if isinstance(value, dict):
                return type(value)((k, convert(v, k)) for k, v in value.items())
            return [convert(v) for v in value] if isinstance(value, list) else value

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if isinstance(value, _Storage):
                    kind = made[STORAGES[value.array.dtype.name]]
                    return ("storage", kind, value.key, "cpu", value.array.size)
                return None

        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(convert(root))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", buffer.getvalue())
        file.writestr("archive/byteorder", byteorder)
        for storage in storages:
            file.writestr(f"archive/data/{storage.key}", storage.array.tobytes())
        file.writestr("archive/version", "3\n")


def lightning(state, shift=1.0, **more):
    """A checkpoint as Lightning writes it: raw weights that differ by `shift` from the averaged ones."""
    raw = OrderedDict((f"backbone.{key}", value + np.float32(shift)) for key, value in state.items())
    raw["backbone.rotary_emb.inv_freq"] = state["rotary_emb.inv_freq"]
    shadow = [value for key, value in state.items() if key != "rotary_emb.inv_freq"]
    ema = {"decay": 0.9999, "num_updates": 20, "shadow_params": shadow}
    optimizer = [{"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": []}]
    return {"epoch": 0, "state_dict": raw, "optimizer_states": optimizer, "ema": ema, **more}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
