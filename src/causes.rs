//! What an errno means, which depends on who said it, and the cheapest repair.
//!
//! The table is made from the kernel's sources (6.12 and 7.2), named at each entry. Where one errno has several causes in one call,
//! and the kernel tells them apart in its log alone, the sentence says "likely".

use nix::libc;

use crate::error::Error;

/// A call that can refuse a buffer or a format, by the name that people look it up with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    /// `DRM_IOCTL_PRIME_FD_TO_HANDLE`.
    PrimeImport,
    /// `DRM_IOCTL_MODE_ADDFB2`.
    AddFramebuffer,
    /// `DRM_IOCTL_MODE_ATOMIC`, with `TEST_ONLY` or for real.
    Commit,
    /// `DRM_IOCTL_MODE_CREATE_DUMB`.
    CreateDumb,
    /// `gbm_bo_import`.
    #[cfg(feature = "gbm")]
    GbmImport,
    /// `DRM_IOCTL_PRIME_FD_TO_HANDLE` of a device whose GBM refused an import.
    #[cfg(feature = "gbm")]
    GbmPrime,
    /// `gbm_bo_create` and `gbm_bo_create_with_modifiers`.
    #[cfg(feature = "gbm")]
    GbmCreate,
    /// `VIDIOC_S_FMT`.
    SetFormat,
    /// `VIDIOC_REQBUFS` for memory of the driver's.
    RequestOwn,
    /// `VIDIOC_REQBUFS` for dma-bufs of others.
    RequestImport,
    /// `VIDIOC_PREPARE_BUF` or `VIDIOC_QBUF` of a dma-buf of others.
    ImportBuffer,
    /// `VIDIOC_EXPBUF`.
    ExportBuffer,
    /// `VIDIOC_STREAMON`.
    StreamOn,
}

/// Why, as a clause, and what to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Cause {
    pub why: &'static str,
    pub repair: &'static str,
}

const fn cause(why: &'static str, repair: &'static str) -> Cause {
    Cause { why, repair }
}

/// Room, wherever it lacks.
const FEWER: &str = "use fewer or smaller buffers";
const LOG: &str = "the kernel log may say which; with drm.debug=0x1f on its command line it says more";

impl Call {
    /// The name in a refusal's `step`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Call::PrimeImport => "PRIME import",
            Call::AddFramebuffer => "AddFB2",
            Call::Commit => "atomic commit",
            Call::CreateDumb => "CREATE_DUMB",
            #[cfg(feature = "gbm")]
            Call::GbmImport => "gbm_bo_import",
            #[cfg(feature = "gbm")]
            Call::GbmPrime => "PRIME import",
            #[cfg(feature = "gbm")]
            Call::GbmCreate => "gbm_bo_create",
            Call::SetFormat => "VIDIOC_S_FMT",
            Call::RequestOwn | Call::RequestImport => "VIDIOC_REQBUFS",
            Call::ImportBuffer => "VIDIOC_QBUF",
            Call::ExportBuffer => "VIDIOC_EXPBUF",
            Call::StreamOn => "VIDIOC_STREAMON",
        }
    }

    /// What this errno means from this call.
    pub(crate) const fn cause(self, errno: i32) -> Cause {
        match self {
            Call::PrimeImport => prime_import(errno),
            Call::AddFramebuffer => add_framebuffer(errno),
            Call::Commit => commit(errno),
            Call::CreateDumb => create_dumb(errno),
            #[cfg(feature = "gbm")]
            Call::GbmImport => gbm_import(errno),
            #[cfg(feature = "gbm")]
            Call::GbmPrime => gbm_prime(errno),
            #[cfg(feature = "gbm")]
            Call::GbmCreate => gbm_create(errno),
            Call::SetFormat => set_format(errno),
            Call::RequestOwn => request_own(errno),
            Call::RequestImport => request_import(errno),
            Call::ImportBuffer => import_buffer(errno),
            Call::ExportBuffer => export_buffer(errno),
            Call::StreamOn => stream_on(errno),
        }
    }

    /// An error of this call with its cause and the repair.
    pub(crate) fn explain(self, error: Error) -> Error {
        let error = error.said_by(self.name());
        match error.errno().map(|errno| self.cause(errno)) {
            Some(Cause { why, repair }) => error.meaning(why).repair(repair),
            None => error,
        }
    }
}

/// drm_gem_prime_fd_to_handle, drm_gem_prime_import_dev and the exporter's attach and map (drm_prime.c, dma-buf.c).
const fn prime_import(errno: i32) -> Cause {
    match errno {
        // dma_buf_get: a descriptor of another sort. drm_gem_dma_prime_import_sg_table: more than one chunk.
        libc::EINVAL => cause(
            "the display's driver cannot use this memory; likely it is not contiguous",
            "let the camera capture into buffers of the display or of a CMA heap",
        ),
        libc::EBADF => cause("the buffer's descriptor is closed", "export the buffer again"),
        libc::ENOMEM => cause("no memory or address space is left to map the buffer for the display", FEWER),
        // No gem_prime_import_sg_table, or no prime_fd_to_handle before 6.6.
        libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY => {
            cause("the display's driver imports no dma-bufs", "use another display, or let frames be copied")
        }
        // Pinned where the display cannot reach (amdgpu_dma_buf_attach and others).
        libc::EBUSY => {
            cause("the buffer is fixed in memory that the display cannot reach", "capture into the display's buffers")
        }
        libc::EMFILE | libc::ENFILE => cause("no descriptor is left", "raise the limit (`ulimit -n`)"),
        libc::ENODEV => cause("a device is gone", "plug it in again"),
        _ => cause("the display's driver refused the buffer", LOG),
    }
}

/// drm_internal_framebuffer_create, framebuffer_check (drm_framebuffer.c), drm_gem_fb_init_with_funcs (its own helper file).
const fn add_framebuffer(errno: i32) -> Cause {
    match errno {
        // A format or modifier that no plane has, a size outside of the card's limits, a stride below a row or not of the driver's
        // liking, a buffer shorter than the rows.
        libc::EINVAL => cause(
            "the display's driver takes no such framebuffer; likely the format or the stride",
            "choose a format that the display scans out, or a stride that is a multiple of 256 bytes",
        ),
        // framebuffer_check: rows times stride pass 4 GiB.
        libc::ERANGE => cause("the picture would pass 4 GiB", "choose a smaller size or stride"),
        // drm_gem_fb_init_with_funcs: no object of that handle.
        libc::ENOENT => cause("the buffer's handle was closed meanwhile", "import it again"),
        libc::ENOMEM => cause("no memory is left", FEWER),
        libc::EOPNOTSUPP => cause("the card has no display hardware", "use another card"),
        _ => cause("the display's driver refused the framebuffer", LOG),
    }
}

/// drm_mode_atomic_ioctl, drm_atomic_plane_check (drm_atomic.c), and the driver's own checks.
const fn commit(errno: i32) -> Cause {
    match errno {
        // A check of the driver: scaling, place, stride, bandwidth, or the buffer could not be mapped (prepare_fb).
        libc::EINVAL => cause(
            "the display's driver does not show it; likely its size, place or stride",
            "choose another format, size or stride; the kernel log may say more with drm.debug=0x10",
        ),
        // drm_framebuffer_check_src_coords.
        libc::ENOSPC => cause("the picture is taken from outside of its buffer", "choose a smaller size"),
        // drm_atomic_plane_check: the place on the CRTC passes INT_MAX.
        libc::ERANGE => cause("the picture lies outside of what the display can address", "choose a smaller size"),
        libc::EACCES | libc::EPERM => {
            cause("this process is not the card's DRM master", "end the other program that drives it")
        }
        libc::EBUSY => cause("an earlier commit has not completed", "present one frame after the other"),
        libc::ENOENT => cause("a connector, CRTC, plane or framebuffer is gone", "join the display again"),
        libc::ENOMEM => cause("no memory is left to map the buffer for the display", FEWER),
        libc::ENODEV => cause("the display's device is gone", "plug it in again"),
        _ => cause("the display's driver refused the commit", LOG),
    }
}

/// drm_mode_create_dumb (drm_dumb_buffers.c).
const fn create_dumb(errno: i32) -> Cause {
    match errno {
        libc::ENOSYS | libc::EOPNOTSUPP => {
            cause("the display's driver makes no dumb buffers", "use a buffer of a dma-heap or of /dev/udmabuf")
        }
        libc::EINVAL => cause("the display's driver makes no buffer of this size", "choose a smaller size"),
        libc::ENOMEM => cause("no memory of the display's is left", FEWER),
        libc::EACCES | libc::EPERM => cause("this process may not use the display", "become its DRM master, or root"),
        _ => cause("the display's driver made no buffer", LOG),
    }
}

/// gbm_dri_bo_import (gbm_dri.c): for whatever its driver did not like, EINVAL with GBM_BO_IMPORT_FD and ENOSYS with
/// GBM_BO_IMPORT_FD_MODIFIER. Memory and format have been looked at before.
#[cfg(feature = "gbm")]
const fn gbm_import(errno: i32) -> Cause {
    match errno {
        libc::ENOMEM => cause("no memory is left to import the buffer for the GPU", FEWER),
        _ => cause(
            "the GPU's driver takes no such buffer; likely the stride, an offset or the tiling",
            "let the camera capture into the GPU's own buffers, or ask for rows of a multiple of 256 bytes (--stride)",
        ),
    }
}

/// drm_gem_prime_fd_to_handle, as for a display.
#[cfg(feature = "gbm")]
const fn gbm_prime(errno: i32) -> Cause {
    match errno {
        libc::EINVAL | libc::EBUSY => cause(
            "the GPU cannot use this memory; likely it is not contiguous, or fixed where the GPU cannot reach it",
            "let the camera capture into the GPU's own buffers",
        ),
        libc::EBADF => cause("the buffer's descriptor was closed", "export it again"),
        libc::ENOMEM => cause("no memory or address space is left to map the buffer for the GPU", FEWER),
        libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY => {
            cause("the GPU's kernel driver imports no dma-bufs", "use another device, or let frames be copied")
        }
        libc::EACCES | libc::EPERM => cause("this process may not use the GPU", "use its render node (renderD128)"),
        libc::EMFILE | libc::ENFILE => {
            cause("no descriptor is left to open the GPU with", "raise the limit (`ulimit -n`)")
        }
        libc::ENODEV => cause("the GPU is gone", "plug it in again"),
        _ => cause("the GPU's kernel driver refused the memory", LOG),
    }
}

/// gbm_dri_bo_create (gbm_dri.c), and the driver's own.
#[cfg(feature = "gbm")]
const fn gbm_create(errno: i32) -> Cause {
    match errno {
        libc::EACCES | libc::EPERM => {
            cause("this process may not make buffers through this node", "use the card's node")
        }
        libc::ENOMEM | libc::ENOSPC => cause("no memory of the GPU's is left", FEWER),
        libc::EINVAL | libc::ENOSYS => cause(
            "the GPU's driver makes no buffer of this size or tiling",
            "choose a smaller size, or another maker's memory",
        ),
        _ => cause("the GPU's driver made no buffer", LOG),
    }
}

/// v4l_s_fmt (v4l2-ioctl.c) and the driver's own checks.
const fn set_format(errno: i32) -> Cause {
    match errno {
        libc::EBUSY => {
            cause("another program has buffers in its queue", "another program streams from this camera; close it")
        }
        libc::EINVAL => cause("the camera lacks the format", "choose one that `dmaflow list` shows"),
        libc::ENODEV => cause("the camera was disconnected", "plug it in again"),
        _ => cause("the camera's driver refused the format", LOG),
    }
}

/// vb2_core_reqbufs (videobuf2-core.c).
const fn request_own(errno: i32) -> Cause {
    match errno {
        libc::EBUSY => cause("another program has its queue", "another program streams from this camera; close it"),
        libc::EINVAL => cause("the driver makes no buffers that can be mapped", LOG),
        libc::ENOMEM => cause(
            "no memory that the device can use is left",
            "ask for fewer or smaller buffers; a driver that needs contiguous memory takes it from CMA (cma= on the kernel's \
             command line)",
        ),
        libc::ENODEV => cause("the camera was disconnected", "plug it in again"),
        _ => cause("the driver made no buffers", LOG),
    }
}

/// vb2_verify_memory_type (videobuf2-core.c): V4L2_MEMORY_DMABUF needs VB2_DMABUF and its operations.
const fn request_import(errno: i32) -> Cause {
    match errno {
        libc::EINVAL => {
            cause("the camera's driver captures into no memory but its own", "use the camera's own buffers")
        }
        _ => request_own(errno),
    }
}

/// __prepare_dmabuf (videobuf2-core.c), vb2_dc_map_dmabuf and its siblings.
const fn import_buffer(errno: i32) -> Cause {
    match errno {
        // vb2_dc_map_dmabuf, "contiguous chunk is too small"; vb2_vmalloc_attach_dmabuf, shorter than the format needs, which
        // __prepare_dmabuf has seen before.
        libc::EFAULT => cause(
            "the camera's device likely needs contiguous memory, and this is not",
            "use the camera's own buffers, or a dma-heap of contiguous memory",
        ),
        // "invalid dmabuf fd", "invalid dmabuf length".
        libc::EINVAL => cause(
            "the camera's driver does not take the memory; likely it is shorter than the format needs",
            "use the camera's own buffers; the kernel log may say more",
        ),
        // dma_buf_map_attachment or dma_buf_vmap failed.
        libc::ENOMEM | libc::EIO => {
            cause("the memory could not be mapped for the camera's device", "use the camera's own buffers")
        }
        libc::EBUSY | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY => {
            cause("the memory's exporter does not let the camera's device use it", "use the camera's own buffers")
        }
        libc::ENODEV => cause("the camera was disconnected", "plug it in again"),
        _ => cause("the camera's driver refused the memory", LOG),
    }
}

/// vb2_core_expbuf (videobuf2-core.c).
const fn export_buffer(errno: i32) -> Cause {
    match errno {
        libc::EMFILE => cause("no descriptor is left", "raise the limit (`ulimit -n`) or ask for fewer buffers"),
        libc::ENOTTY | libc::EINVAL => cause(
            "the camera's driver cannot export its buffers",
            "capture into buffers of the display or of a dma-heap",
        ),
        libc::ENOMEM => cause("no memory is left", FEWER),
        _ => cause("the camera's driver did not export the buffer", LOG),
    }
}

/// vb2_core_streamon (videobuf2-core.c), media_pipeline_start, the driver's own start.
const fn stream_on(errno: i32) -> Cause {
    match errno {
        libc::EINVAL => cause("the driver wants more buffers, or another setting", "ask for more buffers (--buffers)"),
        libc::EPIPE | libc::ENOLINK => {
            cause("the camera's parts are not linked, or their formats differ", "set its media graph up (media-ctl)")
        }
        libc::EBUSY => cause("the camera's hardware is in use", "close the other program"),
        libc::ENOSPC => cause("the bus has no bandwidth left", "ask for a smaller size or rate"),
        libc::EFAULT => import_buffer(libc::EFAULT),
        libc::ENODEV => cause("the camera was disconnected", "plug it in again"),
        _ => cause("the camera's driver did not start", LOG),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &[Call] = &[
        Call::PrimeImport,
        Call::AddFramebuffer,
        Call::Commit,
        Call::CreateDumb,
        #[cfg(feature = "gbm")]
        Call::GbmImport,
        #[cfg(feature = "gbm")]
        Call::GbmPrime,
        #[cfg(feature = "gbm")]
        Call::GbmCreate,
        Call::SetFormat,
        Call::RequestOwn,
        Call::RequestImport,
        Call::ImportBuffer,
        Call::ExportBuffer,
        Call::StreamOn,
    ];

    #[test]
    fn one_errno_means_another_thing_from_another_call() {
        let mut meanings: Vec<_> = ALL.iter().map(|call| call.cause(libc::EINVAL).why).collect();
        meanings.sort_unstable();
        meanings.dedup();
        assert_eq!(meanings.len(), ALL.len());
    }

    #[test]
    fn everything_has_a_why_and_a_repair_in_one_clause() {
        for (call, errno) in ALL.iter().flat_map(|call| (1..134).map(move |errno| (call, errno))) {
            let Cause { why, repair } = call.cause(errno);
            for text in [why, repair] {
                assert!(!text.is_empty() && !text.ends_with('.') && !text.contains('\n'), "{call:?} {errno}: {text}");
            }
        }
    }
}
