"""Results on disk: netCDF files that appear whole or not at all, without pickle."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from tracepatch.combining import require_dataset
from tracepatch.errors import ResultError
from tracepatch.results import Result


def save_result(result: Result, path: str | os.PathLike[str]) -> Path:
    """Writes a result, or ``p.saved``, as netCDF; the file appears whole or not at all.

    Returns:
        The path.
    """
    target = Path(path)
    if not isinstance(result, xr.DataTree) and "saves" not in result.attrs:
        require_dataset(result)
    if target.is_dir():
        raise ResultError(f"{target} is a folder; pass the file to write, such as {target / 'result.nc'}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        result.to_netcdf(partial, engine="h5netcdf")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def open_result(path: str | os.PathLike[str]) -> Result:
    """A result that was written by ``save_result``, in memory.

    Raises:
        ResultError: There is no such file, or it is not a result.
    """
    source = Path(path)
    if not source.is_file():
        raise ResultError(f"There is no file {source}.")
    try:
        with xr.open_datatree(source, engine="h5netcdf") as tree:
            tree.load()
    except (OSError, ValueError, KeyError) as error:
        raise ResultError(
            f"{source} is not a result: it is no netCDF file "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})."
        ) from error
    if "tracepatch_format" not in tree.attrs:
        raise ResultError(
            f"{source} is netCDF, but not a tracepatch result: it has no `tracepatch_format`. Open it with xarray."
        )
    return tree if tree.children else tree.to_dataset()
