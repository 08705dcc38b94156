"""Rendering of MuJoCo scenes, several models in one process."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import numpy as np

MOST = 2048  # pixels


def import_mujoco() -> Any:
    """The module `mujoco`. Without a display it renders by OSMesa, unless $MUJOCO_GL says otherwise.

    Raises ValueError where it cannot render so.
    """
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "osmesa")
    try:
        import mujoco
    except AttributeError as error:  # PyOpenGL without the library: "'NoneType' object has no attribute …"
        raise ValueError(
            f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; install OSMesa "
            "(apt-get install libosmesa6), or set MUJOCO_GL=egl on a machine with a GPU"
        ) from error
    return mujoco


class Renderer:
    """Renders a model from any of its cameras, uint8 [size, size, 3].

    There may be several in a process: what one has is freed in its own OpenGL context. (`mujoco.Renderer` frees it in
    the current one, after which others draw wrong images.) With `full` there are shadows, reflections and antialiasing,
    which take 6 to 8 times as long in software.
    """

    def __init__(self, model: Any, size: int, full: bool = False):
        mujoco = self._mujoco = import_mujoco()
        self.size, self._model = size, model
        if not 16 <= size <= MOST:
            raise ValueError(f"size is {size}; images are 16 to {MOST} pixels high and wide")
        self._context: Any = mujoco.GLContext(size, size)
        self._context.make_current()
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        if not full:
            model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        for flag in ("mjRND_SHADOW", "mjRND_REFLECTION"):
            self._scene.flags[getattr(mujoco.mjtRndFlag, flag)] = full
        self._draw = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._draw)

    def render(self, data: Any, camera: int) -> np.ndarray:
        """The image uint8 [H, W, 3] of the camera with this number, in the present state of the data."""
        mujoco, image = self._mujoco, np.empty((self.size, self.size, 3), np.uint8)
        self._context.make_current()
        self._camera.type, self._camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        view = mujoco.MjrRect(0, 0, self.size, self.size)
        mujoco.mjr_render(view, self._scene, self._draw)
        mujoco.mjr_readPixels(image, None, view, self._draw)
        return np.ascontiguousarray(image[::-1])

    def close(self) -> None:
        """Free its textures and meshes, and then the context that they are in."""
        if self._context is not None:
            self._context.make_current()
            self._draw.free()
            self._context.free()
            self._context = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end, parts of it are gone
            self.close()
