//! A dma-buf as Vulkan memory.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use ash::vk;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::failure::{OTHER_MEMORY, code, refuse};
use super::gpu::Gpu;
use crate::dmabuf::DmaBuf;
use crate::endpoint::Refusal;

const ALLOCATE: &str = "vkAllocateMemory";
const PROPERTIES: &str = "vkGetMemoryFdPropertiesKHR";

/// What the memory is for, where it is to be of that alone (`VkMemoryDedicatedAllocateInfo`).
#[derive(Clone, Copy)]
pub(super) enum Dedicated {
    No,
    Image(vk::Image),
    Buffer(vk::Buffer),
}

/// What is put into the memory, and wants it so.
#[derive(Clone, Copy)]
pub(super) struct Needs {
    /// The call that told.
    pub(super) told_by: &'static str,
    /// In bytes.
    pub(super) size: vk::DeviceSize,
    /// The types of memory that it can be in.
    pub(super) bits: u32,
    pub(super) dedicated: Dedicated,
}

/// Imports a dma-buf as memory of a type that both the buffer and what is put into it can have. The memory is the caller's to free; it
/// keeps the kernel's reference.
///
/// # Errors
/// The refusal; the descriptor stays the caller's either way.
pub(super) fn import(gpu: &Gpu, dma_buf: &DmaBuf, needs: Needs) -> Result<vk::DeviceMemory, Refusal> {
    let Needs { told_by, size, bits, dedicated } = needs;
    let there = u64::try_from(dma_buf.len()).unwrap_or(u64::MAX);
    if size > there {
        let why = format!(
            "the GPU needs {size} bytes for it, and the buffer has {there}: its driver wants longer or more rows"
        );
        return Err(refuse(told_by, why, OTHER_MEMORY));
    }
    let kind = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;
    let mut properties = vk::MemoryFdPropertiesKHR::default();
    // SAFETY: the descriptor is an open dma-buf; the call borrows it.
    let asked = unsafe {
        gpu.memory_fd()
            .get_memory_fd_properties(kind, dma_buf.as_fd().as_raw_fd(), &mut properties)
    };
    asked.map_err(|result| refused(PROPERTIES, dma_buf, result))?;
    let both = properties.memory_type_bits & bits;
    let Some(memory_type) = gpu.memory_type(both, vk::MemoryPropertyFlags::empty()) else {
        let why = format!(
            "no memory type of the GPU suits both this memory ({:#x}) and what is put into it ({bits:#x})",
            properties.memory_type_bits
        );
        return Err(refuse(PROPERTIES, why, OTHER_MEMORY));
    };
    let fd = dma_buf.as_fd().try_clone_to_owned().map_err(|cause| Refusal {
        errno: cause.raw_os_error(),
        ..refuse(ALLOCATE, format!("no descriptor for the driver: {cause}"), "raise the limit (`ulimit -n`)")
    })?;
    let fd = fd.into_raw_fd();
    let mut import = vk::ImportMemoryFdInfoKHR::default().handle_type(kind).fd(fd);
    let mut only = vk::MemoryDedicatedAllocateInfo::default();
    let mut info = vk::MemoryAllocateInfo::default()
        .allocation_size(size)
        .memory_type_index(memory_type)
        .push_next(&mut import);
    info = match dedicated {
        Dedicated::No => info,
        Dedicated::Image(image) => {
            only = only.image(image);
            info.push_next(&mut only)
        }
        Dedicated::Buffer(buffer) => {
            only = only.buffer(buffer);
            info.push_next(&mut only)
        }
    };
    // SAFETY: the device lives (`gpu`); the type is of those that the buffer can be imported as; what `info` points to lives until
    // the call returns; the descriptor is open.
    let memory = unsafe { gpu.device().allocate_memory(&info, None) };
    // Where this succeeds the driver owns the descriptor, and only there (VkImportMemoryFdInfoKHR).
    memory.map_err(|result| {
        take_back(fd, dma_buf, gpu.physical().closes_refused());
        refused(ALLOCATE, dma_buf, result)
    })
}

/// Closes the descriptor of an import that failed. It is still ours, by the specification; lavapipe closes it all the same
/// (`lvp_AllocateMemory`, lvp_device.c of Mesa 25.0), after which its number may already be a descriptor of another thread's. So with a
/// driver that may have closed it, it is closed only if it still is of this dma-buf. That leaves one case there: another thread that has
/// duplicated a descriptor of the same dma-buf in between, and got that number.
fn take_back(fd: RawFd, dma_buf: &DmaBuf, may_be_closed: bool) {
    if !may_be_closed || dma_buf.is_behind(fd) {
        // SAFETY: made by `import`, which has given it to nobody but a driver that did not take it; open, as was just seen.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

/// Whether a refusal is of the memory, and not of what was to be put into it.
pub(super) fn is_of_memory(refusal: &Refusal) -> bool {
    [ALLOCATE, PROPERTIES].contains(&refusal.step)
}

/// What a failed import means. Most drivers take a buffer that is exported for reading alone; those that map it themselves do not
/// (lavapipe: `llvmpipe_import_memory_fd` maps it for reading and writing).
fn refused(call: &'static str, dma_buf: &DmaBuf, result: vk::Result) -> Refusal {
    let said = code(result);
    match result {
        vk::Result::ERROR_INVALID_EXTERNAL_HANDLE if is_read_only(dma_buf) => refuse(
            call,
            format!("the buffer was exported read-only, and the GPU's driver wants it read-write ({said})"),
            "export read-write (O_RDWR); of a camera that is shared: dmaflow share --writable",
        ),
        vk::Result::ERROR_INVALID_EXTERNAL_HANDLE => {
            refuse(call, format!("the GPU's driver cannot use this memory ({said})"), OTHER_MEMORY)
        }
        vk::Result::ERROR_OUT_OF_DEVICE_MEMORY
        | vk::Result::ERROR_OUT_OF_HOST_MEMORY
        | vk::Result::ERROR_TOO_MANY_OBJECTS => {
            refuse(call, format!("no memory is left to import into the GPU ({said})"), "use fewer or smaller buffers")
        }
        vk::Result::ERROR_DEVICE_LOST => {
            refuse(call, format!("the GPU was reset, or is gone ({said})"), "the kernel log says why; start again")
        }
        _ => refuse(call, format!("the GPU's driver refused the memory ({said})"), OTHER_MEMORY),
    }
}

fn is_read_only(dma_buf: &DmaBuf) -> bool {
    let flags = fcntl(dma_buf.as_fd(), FcntlArg::F_GETFL).map(OFlag::from_bits_truncate);
    flags.is_ok_and(|flags| flags & OFlag::O_ACCMODE == OFlag::O_RDONLY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    /// A file stands for the dma-buf: what counts is the inode.
    fn file() -> OwnedFd {
        memfd_create("test", MFdFlags::MFD_CLOEXEC).unwrap()
    }

    #[test]
    fn a_descriptor_is_taken_back_only_while_it_is_of_the_buffer() {
        let buffer = DmaBuf::new(file()).unwrap();
        let ours = buffer.as_fd().try_clone_to_owned().unwrap().into_raw_fd();
        assert!(buffer.is_behind(ours));
        take_back(ours, &buffer, true);
        assert!(!buffer.is_behind(ours));
        // Closed by a driver, and the number given to something else.
        let other = file();
        take_back(other.as_raw_fd(), &buffer, true);
        assert!(DmaBuf::new(other).is_ok(), "somebody else's descriptor was closed");
        take_back(RawFd::MAX, &buffer, true);
        // A driver that does as is specified has left it ours, whatever can be seen of it.
        let (mut kept, given) = UnixStream::pair().unwrap();
        kept.set_nonblocking(true).unwrap();
        take_back(given.into_raw_fd(), &buffer, false);
        assert_eq!(kept.read(&mut [0]).unwrap(), 0, "the other end is still open");
    }
}
