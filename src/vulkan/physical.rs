//! Physical devices: what they are, and what they can import.

use std::ffi::CStr;
use std::fmt;
use std::path::{Path, PathBuf};

use ash::{ext, khr, vk};
use nix::sys::stat::{major, makedev, minor, stat};

use super::failure::failed;
use crate::error::{Error, Kind, Result};

/// The extensions that an import needs.
pub(super) const NEEDED: [&CStr; 4] = [
    khr::external_memory_fd::NAME,
    ext::external_memory_dma_buf::NAME,
    ext::image_drm_format_modifier::NAME,
    ext::queue_family_foreign::NAME,
];

/// The extensions that fences need.
pub(super) const FENCES: [&CStr; 2] = [khr::external_semaphore_fd::NAME, khr::external_fence_fd::NAME];

/// What sort of device a GPU is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum GpuKind {
    /// With memory of its own.
    Discrete,
    /// With the processor's memory.
    Integrated,
    /// Of a virtual machine.
    Virtual,
    /// Another sort.
    Other,
    /// The processor itself: what it reads and writes, the CPU reads and writes.
    Software,
}

impl fmt::Display for GpuKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            GpuKind::Discrete => "discrete",
            GpuKind::Integrated => "integrated",
            GpuKind::Virtual => "virtual",
            GpuKind::Other => "other",
            GpuKind::Software => "software",
        })
    }
}

/// What a GPU says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuInfo {
    /// Its name, as in `AMD Radeon RX 6600 (RADV NAVI23)`.
    pub name: String,
    /// Its driver and the driver's version, as in `radv Mesa 25.0.7`.
    pub driver: String,
    /// Its sort.
    pub kind: GpuKind,
    /// Its Vulkan version: major, minor, patch.
    pub version: (u32, u32, u32),
    /// Its DRM nodes, primary and render (`VK_EXT_physical_device_drm`); none for a software GPU.
    pub nodes: Vec<PathBuf>,
}

impl GpuInfo {
    /// Whether the CPU does its work.
    pub fn is_software(&self) -> bool {
        self.kind == GpuKind::Software
    }
}

/// A physical device of an instance.
#[derive(Clone)]
pub(super) struct Physical {
    instance: ash::Instance,
    pub(super) raw: vk::PhysicalDevice,
    extensions: Vec<vk::ExtensionProperties>,
    pub(super) info: GpuInfo,
    /// Device numbers of the DRM nodes.
    numbers: Vec<u64>,
    /// Whether the driver is lavapipe.
    lavapipe: bool,
    /// Whether images of several colour planes can be had (the feature `samplerYcbcrConversion`): by the driver, and on the device.
    pub(super) ycbcr: bool,
}

impl Physical {
    /// What it takes at most.
    pub(super) fn limits(&self) -> vk::PhysicalDeviceLimits {
        // SAFETY: the device is of this instance, which lives (`Physical::new`).
        unsafe { self.instance.get_physical_device_properties(self.raw) }.limits
    }

    /// Asks a physical device what it is.
    ///
    /// # Safety
    /// `raw` is of `instance`, which must not be destroyed before the result is dropped.
    ///
    /// # Errors
    /// What `vkEnumerateDeviceExtensionProperties` says.
    pub(super) unsafe fn new(instance: ash::Instance, raw: vk::PhysicalDevice) -> Result<Physical> {
        // SAFETY: by this function's contract.
        let properties = unsafe { instance.get_physical_device_properties(raw) };
        let name = text(properties.device_name_as_c_str());
        // SAFETY: as above.
        let extensions = unsafe { instance.enumerate_device_extension_properties(raw) }
            .map_err(|result| failed("vkEnumerateDeviceExtensionProperties", "ask", &name, result))?;
        let version = properties.api_version;
        let kind = match properties.device_type {
            vk::PhysicalDeviceType::DISCRETE_GPU => GpuKind::Discrete,
            vk::PhysicalDeviceType::INTEGRATED_GPU => GpuKind::Integrated,
            vk::PhysicalDeviceType::VIRTUAL_GPU => GpuKind::Virtual,
            vk::PhysicalDeviceType::CPU => GpuKind::Software,
            _ => GpuKind::Other,
        };
        let version = (vk::api_version_major(version), vk::api_version_minor(version), vk::api_version_patch(version));
        let info = GpuInfo { name, driver: String::new(), kind, version, nodes: Vec::new() };
        let mut physical =
            Physical { instance, raw, extensions, info, numbers: Vec::new(), lavapipe: false, ycbcr: false };
        if physical.info.version >= (1, 1, 0) {
            physical.ask_more();
        }
        Ok(physical)
    }

    /// What takes Vulkan 1.1 to ask: images of several planes, and the driver's name and the nodes, where the device tells.
    fn ask_more(&mut self) {
        let mut ycbcr = vk::PhysicalDeviceSamplerYcbcrConversionFeatures::default();
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut ycbcr);
        // SAFETY: `new`'s contract; Vulkan 1.1 has the call and the structure.
        unsafe { self.instance.get_physical_device_features2(self.raw, &mut features) };
        self.ycbcr = ycbcr.sampler_ycbcr_conversion == vk::TRUE;
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut nodes = vk::PhysicalDeviceDrmPropertiesEXT::default();
        let mut all = vk::PhysicalDeviceProperties2::default();
        let tells_driver = self.at_least(1, 2) || self.has(khr::driver_properties::NAME);
        if tells_driver {
            all = all.push_next(&mut driver);
        }
        if self.has(ext::physical_device_drm::NAME) {
            all = all.push_next(&mut nodes);
        }
        // SAFETY: `new`'s contract; Vulkan 1.1 has the call, and each structure of the chain is of an extension that is there.
        unsafe { self.instance.get_physical_device_properties2(self.raw, &mut all) };
        if tells_driver {
            let (name, version) = (text(driver.driver_name_as_c_str()), text(driver.driver_info_as_c_str()));
            self.info.driver = format!("{name} {version}").trim().to_owned();
            self.lavapipe = driver.driver_id == vk::DriverId::MESA_LLVMPIPE;
        }
        let primary = (nodes.has_primary, nodes.primary_major, nodes.primary_minor);
        let render = (nodes.has_render, nodes.render_major, nodes.render_minor);
        for (there, major, minor) in [primary, render] {
            if there == vk::TRUE
                && let (Ok(major), Ok(minor)) = (u64::try_from(major), u64::try_from(minor))
            {
                self.numbers.push(makedev(major, minor));
            }
        }
        self.info.nodes = self.numbers.iter().filter_map(|&number| node_of(number)).collect();
    }

    /// Whether the driver closes the descriptor of an import that it refuses, which is not its own then.
    pub(super) fn closes_refused(&self) -> bool {
        self.lavapipe
    }

    /// Whether the device has this version of Vulkan.
    pub(super) fn at_least(&self, major: u32, minor: u32) -> bool {
        self.info.version >= (major, minor, 0)
    }

    /// Whether the device has this extension.
    pub(super) fn has(&self, extension: &CStr) -> bool {
        self.extensions
            .iter()
            .any(|there| there.extension_name_as_c_str() == Ok(extension))
    }

    /// Whether this is the device that a person calls `name`: a DRM node, or a part of the name of device or driver.
    ///
    /// # Errors
    /// If a path cannot be looked at.
    pub(super) fn is_called(&self, name: &str) -> Result<bool> {
        if name.contains('/') {
            return self.is_at(Path::new(name));
        }
        let name = name.to_lowercase();
        Ok([&self.info.name, &self.info.driver]
            .iter()
            .any(|text| text.to_lowercase().contains(&name)))
    }

    /// Whether this is the device of a DRM node, primary or render.
    ///
    /// # Errors
    /// If the path cannot be looked at.
    pub(super) fn is_at(&self, node: &Path) -> Result<bool> {
        let stat = stat(node);
        let stat = stat.map_err(|errno| Error::from_io("look at", node.display().to_string(), errno.into()))?;
        Ok(self.numbers.contains(&stat.st_rdev))
    }

    /// Whether dma-bufs can be imported at all.
    ///
    /// # Errors
    /// [`Kind::Unsupported`], naming what is missing.
    pub(super) fn can_import(&self) -> Result<()> {
        let missing = || Error::new(Kind::Unsupported, "import dma-bufs into", &self.info.name);
        if !self.at_least(1, 1) {
            return Err(missing().because("it has Vulkan 1.0 alone").repair("update its driver"));
        }
        let lacks: Vec<_> = NEEDED
            .iter()
            .filter(|name| !self.has(name))
            .map(|name| name.to_string_lossy())
            .collect();
        if lacks.is_empty() {
            return Ok(());
        }
        let error = missing().because(format!("its driver lacks {}", lacks.join(", ")));
        // lvp_device.c of Mesa: two of them only where /dev/udmabuf opens for reading and writing.
        Err(if self.info.is_software() {
            error.repair("a newer Mesa has them where this user may open /dev/udmabuf for reading and writing")
        } else {
            error.repair("update its driver; Mesa's have them")
        })
    }

    /// The extensions to make a device with: those needed, what they need in Vulkan 1.1, and those for fences where they are there.
    pub(super) fn device_extensions(&self) -> Vec<&'static CStr> {
        let mut names = NEEDED.to_vec();
        if !self.at_least(1, 2) {
            names.push(khr::image_format_list::NAME);
        }
        if self.has_sync_fd() {
            names.extend(FENCES);
        }
        names
    }

    /// Whether fences go in and out as sync files. In Vulkan 1.1 nothing else is needed for that.
    pub(super) fn has_sync_fd(&self) -> bool {
        self.at_least(1, 1) && FENCES.iter().all(|name| self.has(name))
    }

    /// The device's functions of physical devices.
    pub(super) fn instance(&self) -> &ash::Instance {
        &self.instance
    }
}

fn text(name: Result<&CStr, std::ffi::FromBytesUntilNulError>) -> String {
    name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The node with this device number, by the kernel's name of it.
fn node_of(number: u64) -> Option<PathBuf> {
    let uevent = format!("/sys/dev/char/{}:{}/uevent", major(number), minor(number));
    let text = std::fs::read_to_string(uevent).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}
