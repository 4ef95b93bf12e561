"""Files and folders on disk: written completely or not at all, and checked before use."""

from gainlens.files.content import FORMAT, opened, sealed
from gainlens.files.folders import check_sums, written_folder
from gainlens.files.parts import check_writable, locked
from gainlens.files.reading import file_kind, load_tensors, read_json
from gainlens.files.writing import check_free, save_tensors, write_json, written_whole

__all__ = [
    "FORMAT",
    "check_free",
    "check_sums",
    "check_writable",
    "file_kind",
    "load_tensors",
    "locked",
    "opened",
    "read_json",
    "save_tensors",
    "sealed",
    "write_json",
    "written_folder",
    "written_whole",
]
