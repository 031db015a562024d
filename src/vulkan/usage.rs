//! What images and buffers over memory of others may be used as.

use ash::vk;

/// What a driver is asked of, and what needs no more than the device is made with. Not, for one, `TRANSIENT_ATTACHMENT`, which goes with
/// attachments alone (VUID-VkImageCreateInfo-usage-00963).
const IMAGES: vk::ImageUsageFlags = vk::ImageUsageFlags::from_raw(
    vk::ImageUsageFlags::TRANSFER_SRC.as_raw()
        | vk::ImageUsageFlags::TRANSFER_DST.as_raw()
        | vk::ImageUsageFlags::SAMPLED.as_raw()
        | vk::ImageUsageFlags::STORAGE.as_raw()
        | vk::ImageUsageFlags::COLOR_ATTACHMENT.as_raw()
        | vk::ImageUsageFlags::INPUT_ATTACHMENT.as_raw(),
);

/// Those of Vulkan 1.0. Not, for one, `SHADER_DEVICE_ADDRESS`: its memory has to be allocated for it
/// (VUID-vkBindBufferMemory-bufferDeviceAddress-03339).
const BUFFERS: vk::BufferUsageFlags = vk::BufferUsageFlags::from_raw(
    vk::BufferUsageFlags::TRANSFER_SRC.as_raw()
        | vk::BufferUsageFlags::TRANSFER_DST.as_raw()
        | vk::BufferUsageFlags::UNIFORM_TEXEL_BUFFER.as_raw()
        | vk::BufferUsageFlags::STORAGE_TEXEL_BUFFER.as_raw()
        | vk::BufferUsageFlags::UNIFORM_BUFFER.as_raw()
        | vk::BufferUsageFlags::STORAGE_BUFFER.as_raw()
        | vk::BufferUsageFlags::INDEX_BUFFER.as_raw()
        | vk::BufferUsageFlags::VERTEX_BUFFER.as_raw()
        | vk::BufferUsageFlags::INDIRECT_BUFFER.as_raw(),
);

/// Whether an image of memory that is shared can be used so: the specification wants some use of it
/// (VUID-VkImageCreateInfo-usage-requiredbitmask), and many uses want more of the device or of the memory.
///
/// # Errors
/// Why not, as a clause.
pub(super) fn of_image(usage: vk::ImageUsageFlags) -> Result<(), String> {
    let others = usage & !IMAGES;
    if usage.is_empty() {
        return Err("nobody said what the image is used as".to_owned());
    }
    if others.is_empty() { Ok(()) } else { Err(format!("an image of shared memory is not used as {others:?}")) }
}

/// The same of a buffer (VUID-VkBufferCreateInfo-usage-requiredbitmask).
///
/// # Errors
/// Why not, as a clause.
pub(super) fn of_buffer(usage: vk::BufferUsageFlags) -> Result<(), String> {
    let others = usage & !BUFFERS;
    if usage.is_empty() {
        return Err("nobody said what the buffer is used as".to_owned());
    }
    if others.is_empty() { Ok(()) } else { Err(format!("a buffer of shared memory is not used as {others:?}")) }
}

/// What a person does about it.
pub(super) const OTHER_USE: &str = "use it for transfers, in shaders, or images as attachments";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses() {
        use vk::{BufferUsageFlags as Buffer, ImageUsageFlags as Image};
        assert_eq!(of_image(Image::SAMPLED | Image::TRANSFER_SRC | Image::COLOR_ATTACHMENT), Ok(()));
        assert!(of_image(Image::empty()).unwrap_err().contains("nobody said"));
        let refused = of_image(Image::SAMPLED | Image::TRANSIENT_ATTACHMENT).unwrap_err();
        assert!(refused.contains("TRANSIENT_ATTACHMENT") && !refused.contains("SAMPLED"), "{refused}");
        assert_eq!(of_buffer(Buffer::STORAGE_BUFFER | Buffer::TRANSFER_DST), Ok(()));
        assert!(of_buffer(Buffer::empty()).unwrap_err().contains("nobody said"));
        assert!(of_buffer(Buffer::STORAGE_BUFFER | Buffer::SHADER_DEVICE_ADDRESS).is_err());
    }
}
