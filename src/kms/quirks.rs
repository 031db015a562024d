//! Drivers that take a buffer and show another picture: refused before anybody sees it.

use super::Card;
use crate::endpoint::{Refusal, Rung};
use crate::format::Layout;

/// The refusal of a layout that this card's driver is known to show wrong.
///
/// vkms, at least up to Linux 7.2, takes the address of every colour plane from the first memory plane and adds the offset of the
/// first colour plane twice (`packed_pixels_addr` in `vkms_formats.c`, over a mapping that `drm_gem_fb_vmap` has put the offset
/// into). One in which that is corrected says so by its patch level (`tools/vm/guest/vkms-planes.patch`).
pub(super) fn shown_wrong(card: &Card, layout: &Layout) -> Option<Refusal> {
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
