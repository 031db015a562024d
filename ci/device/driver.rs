//! What a camera's driver itself says of its queue, asked beside the library.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::Result;
use dmaflow::endpoint::Source;
use dmaflow::v4l2::Camera;

nix::ioctl_readwrite!(querybuf, b'V', 9, v4l::v4l_sys::v4l2_buffer);

/// How many of the camera's buffers the driver has, by its own word: those that it fills or will fill, and those filled that nobody took yet.
pub fn with_the_driver(camera: &Camera) -> Result<usize> {
    let mut count = 0;
    for index in 0..u32::try_from(camera.buffers().len())? {
        // SAFETY: integers and a union of integers and pointers, for which zero is a value.
        let mut buffer: v4l::v4l_sys::v4l2_buffer = unsafe { std::mem::zeroed() };
        buffer.index = index;
        buffer.type_ = v4l::v4l_sys::v4l2_buf_type_V4L2_BUF_TYPE_VIDEO_CAPTURE;
        buffer.memory = v4l::v4l_sys::v4l2_memory_V4L2_MEMORY_MMAP;
        // SAFETY: the camera's descriptor is open, and of the structure, which has this size and, being single-planar, no array to point
        // to, the call writes its fields alone.
        unsafe { querybuf(camera.as_fd().as_raw_fd(), &mut buffer)? };
        let its_own = v4l::v4l_sys::V4L2_BUF_FLAG_QUEUED | v4l::v4l_sys::V4L2_BUF_FLAG_DONE;
        count += usize::from(buffer.flags & its_own != 0);
    }
    Ok(count)
}
