//! Whether memory whose tiling nobody stated lies in rows.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};

use super::failure::refuse;
use crate::dmabuf::DmaBuf;
use crate::endpoint::Refusal;
use crate::format::{Layout, Modifier};

/// The modifier that the layout states; LINEAR where it states none and the memory's makers know nothing else.
///
/// # Errors
/// The refusal of memory that somebody may have tiled: unstated is not LINEAR.
pub(super) fn stated_modifier<'a>(
    layout: &Layout,
    memory: impl Iterator<Item = &'a DmaBuf>,
) -> Result<Modifier, Refusal> {
    if let Some(modifier) = layout.modifier() {
        return Ok(modifier);
    }
    for dma_buf in memory {
        if let Nature::Unknown(exporter) = nature(dma_buf) {
            let why = format!("nobody stated how the buffer is tiled, and its exporter ({exporter}) may tile");
            return Err(refuse("modifiers", why, "state the modifier in the layout: who made the buffer can tell"));
        }
    }
    Ok(Modifier::LINEAR)
}

/// What a dma-buf's exporter tells of its tiling.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Nature {
    /// Its makers know rows alone.
    Linear,
    /// The exporter of this name may have tiled it.
    Unknown(String),
}

/// Asks the kernel who exported the buffer (`exp_name` in `fdinfo`, dma_buf_show_fdinfo in dma-buf.c).
///
/// Linear by nature are buffers of
/// - V4L2 (`videobuf2_…`, the modules of videobuf2 that export): tiled layouts have fourccs of their own there, none of which is known
///   to this library;
/// - dma-heaps (the heap's name, `dma_heap_get_name`) and `udmabuf`: plain memory that nobody but its user has laid out.
///
/// A DRM driver's buffer is not (most exporters there call themselves `drm`, drm_gem_prime_export): the driver may have chosen any
/// tiling, and only whoever made the buffer can tell. Who has a dumb buffer, which is linear, states so in its layout.
fn nature(dma_buf: &DmaBuf) -> Nature {
    let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", dma_buf.as_fd().as_raw_fd())).unwrap_or_default();
    let exporter = fdinfo.lines().find_map(|line| line.strip_prefix("exp_name:")).map(str::trim);
    let heap = |name: &str| !name.contains('/') && fs::exists(format!("/dev/dma_heap/{name}")).unwrap_or(false);
    match exporter {
        Some(name) if name.starts_with("videobuf2") || name == "udmabuf" => Nature::Linear,
        Some(name) if heap(name) => Nature::Linear,
        Some(name) => Nature::Unknown(name.to_owned()),
        None => Nature::Unknown("an unknown exporter".to_owned()),
    }
}
