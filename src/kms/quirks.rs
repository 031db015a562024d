//! Drivers that take a buffer and show another picture: refused before anybody sees it.

use super::Card;
use crate::endpoint::{Refusal, Rung};
use crate::format::Layout;

/// What the strides must be a multiple of, in bytes.
///
/// AMD's display engines fetch rows from addresses that are multiples of 256 bytes (`amdgpu_align_pitch` in amdgpu_device.c; DCN and
/// DCE take the pitch in such units).
pub(super) fn stride_align(card: &Card) -> u32 {
    match card.info().driver.as_str() {
        "amdgpu" => 256,
        _ => 1,
    }
}

/// Whether the driver is known to fail with `IN_FENCE_FD`.
///
/// nvidia-drm refuses each commit with one before its version 560 (`EPERM`; NVIDIA's open-gpu-kernel-modules, issue 622), and has been seen
/// to stop showing pictures with one after that (Smithay, pull request 1489). Its version in `DRM_IOCTL_VERSION` does not tell which it is.
pub(super) fn fails_with_fences(card: &Card) -> bool {
    card.info().driver == "nvidia-drm"
}

/// Whether the driver may read a frame's memory after the flip event of the next one.
///
/// Scanout hardware has left a picture when it shows the next: `flip_done` of `struct drm_crtc_commit` (drm_atomic.h). vkms reads pictures
/// on a work queue, when somebody wants CRCs, and sends the event without waiting for it; the commit of the next picture waits for
/// that work at its very end (`vkms_atomic_commit_tail` in vkms_drv.c), after the event and before `cleanup_done`.
pub(super) fn reads_late(card: &Card) -> bool {
    card.info().driver == "vkms"
}

/// The refusal of a layout that this card's driver is known to show wrong.
///
/// vkms, at least up to Linux 7.2, takes the address of every colour plane from the first memory plane and adds the offset of the
/// first colour plane twice (`packed_pixels_addr` in `vkms_formats.c`, over a mapping that `drm_gem_fb_vmap` has put the offset
/// into). One in which that is corrected says so by its patch level (`tools/vm/guest/patches/vkms-planes.patch`).
pub(super) fn shown_wrong(card: &Card, layout: &Layout, stride_align: u32) -> Option<Refusal> {
    let uneven = layout.planes().iter().find(|plane| plane.stride % stride_align != 0);
    if let Some(plane) = uneven {
        return Some(Refusal {
            rung: Rung::Exported,
            step: "driver check",
            errno: None,
            why: format!(
                "rows of {} bytes are not a multiple of {stride_align}, as this display wants them",
                plane.stride
            ),
            repair: "let the source capture into the display's buffers, or ask it for such rows (--stride)".to_owned(),
        });
    }
    if card.info().driver != "vkms" || card.info().version > (1, 0, 0) {
        return None;
    }
    let several = layout.memory_planes() > 1;
    let offset = layout.planes().first().is_some_and(|plane| plane.offset != 0);
    let (why, repair) = match (several, offset) {
        (true, _) => (
            "vkms reads every colour plane from the first memory plane, and would show a wrong picture",
            "ask the camera for the format in one memory plane (NV12, not NM12)",
        ),
        (false, true) => (
            "vkms adds the offset of the first colour plane twice, and would show a wrong picture",
            "ask the camera for a format whose data starts with the buffer",
        ),
        (false, false) => return None,
    };
    Some(Refusal {
        rung: Rung::Exported,
        step: "driver check",
        errno: None,
        why: why.to_owned(),
        repair: repair.to_owned(),
    })
}
