//! Whether there is a GPU of hardware at all, without loading Vulkan.

use std::fs;

/// Drivers with a render node and no GPU behind it.
const VIRTUAL: [&str; 2] = ["vgem", "vkms"];

/// Whether a driver of hardware has a render node: a look into sysfs, microseconds where loading Vulkan takes tens of milliseconds. That
/// there is a Vulkan driver for it is another matter. Where sysfs cannot be read the answer is yes: Vulkan has to be asked.
pub fn has_hardware() -> bool {
    let Ok(entries) = fs::read_dir("/sys/class/drm") else { return true };
    entries.flatten().any(|entry| {
        let is_render = entry.file_name().to_string_lossy().starts_with("renderD");
        let device = entry.path().join("device");
        let driver = fs::read_link(device.join("driver")).or_else(|_| fs::read_link(device.join("subsystem")));
        let name = driver
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        let itself = fs::canonicalize(&device).unwrap_or_default();
        let known = |name: &str| VIRTUAL.iter().any(|driver| name.starts_with(driver));
        let is_virtual =
            name.as_deref().is_some_and(known) || itself.file_name().is_some_and(|name| known(&name.to_string_lossy()));
        is_render && !is_virtual
    })
}
