"""Writes what torch would, without torch; and what torch never would."""

import collections
import io
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np

STORAGE_NAMES = {
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


class Name:
    """Pickles as a name of a module, without being importable here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class View:
    """Pickles as a tensor does; the strides count elements."""

    def __init__(self, key: str, flat: np.ndarray, shape, stride=None, offset=0):
        if stride is None:
            stride = tuple(
                s // flat.itemsize for s in np.empty(shape, flat.dtype).strides
            )
        self.key, self.flat = key, flat
        self.shape, self.stride, self.offset = shape, stride, offset


class Call:
    """Pickles as the result of calling a name."""

    def __init__(self, function: Name, *args):
        self.function, self.args = function, args


class TorchPickler(pickle._Pickler):  # the one in Python, which lets names be made up
    dispatch = pickle._Pickler.dispatch.copy()

    def save_name(self, obj: Name) -> None:
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj: Call) -> None:
        self.save(obj.function)
        self.save(obj.args)
        self.write(pickle.REDUCE)

    def save_view(self, obj: View) -> None:
        storage = Storage(obj)
        hooks = collections.OrderedDict()
        rebuild = Name("torch._utils", "_rebuild_tensor_v2")
        args = (storage, obj.offset, obj.shape, obj.stride, False, hooks)
        self.save(Call(rebuild, *args))

    def save_storage(self, obj: "Storage") -> None:
        view = obj.view
        name = Name("torch", STORAGE_NAMES[view.flat.dtype])
        self.save(("storage", name, view.key, "cpu", view.flat.size))
        self.write(pickle.BINPERSID)

    dispatch[Name] = save_name
    dispatch[Call] = save_call
    dispatch[View] = save_view


class Storage:
    def __init__(self, view: View):
        self.view = view


def torch_pickle(state, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    TorchPickler(file, protocol).dump(state)
    return file.getvalue()


def write_bin(path: pathlib.Path, data: bytes, storages=(), method=zipfile.ZIP_STORED):
    """What torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, flat in dict(storages).items():
            archive.writestr(f"archive/data/{key}", flat.tobytes())
    return path


def save(path: pathlib.Path, state: dict[str, View], **options) -> pathlib.Path:
    storages = {view.key: view.flat for view in state.values()}
    return write_bin(path, torch_pickle(state, **options), storages)
