//! The loader and a Vulkan instance, found at run time.

use std::ffi::CStr;

use ash::{ext, vk};

use super::failure::failed;
use super::messages::Messages;
use crate::error::{Error, Kind, Result};

/// The layer that checks every call against the specification.
const VALIDATION: &CStr = c"VK_LAYER_KHRONOS_validation";

/// The version of Vulkan that is used.
const API_VERSION: u32 = vk::API_VERSION_1_2;

/// An instance of its own, and what must outlive it. Destroyed on drop, after the devices made of it.
pub(super) struct Instance {
    pub(super) raw: ash::Instance,
    messenger: Option<(ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>,
    pub(super) messages: Option<Messages>,
    /// Keeps the loader's code in memory. Last: everything above calls it.
    _entry: ash::Entry,
}

impl Instance {
    /// Loads the Vulkan loader and makes an instance; with `validation`, the validation layer watches it, synchronization included.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no loader, no driver, or no validation layer; [`Kind::Unsupported`] for Vulkan 1.0 alone.
    pub(super) fn new(validation: bool) -> Result<Instance> {
        // SAFETY: loading runs the initializers of libvulkan.so.1, the system's Vulkan loader, which asks nothing of its caller
        // ("Application Interface to Loader"); the result is kept for as long as anything of it is used.
        let entry = unsafe { ash::Entry::load() }.map_err(|cause| {
            // In words: as an error it is told once with its own cause, and the cause once more.
            Error::new(Kind::NotFound, "load", "the Vulkan loader")
                .because(cause.to_string())
                .repair("install it (Debian: libvulkan1) and a driver (mesa-vulkan-drivers)")
        })?;
        // SAFETY: the entry points are those of a loader just loaded. The same holds for the calls below.
        let version = unsafe { entry.try_enumerate_instance_version() };
        let version = version.map_err(|result| no_instance("vkEnumerateInstanceVersion", result))?;
        if version.is_none_or(|version| version < vk::API_VERSION_1_1) {
            let error = Error::new(Kind::Unsupported, "use", "the Vulkan loader");
            return Err(error.because("it knows Vulkan 1.0 alone").repair("update libvulkan1"));
        }
        let messages = validation.then(Messages::default);
        if validation {
            require_layer(&entry)?;
        }
        let application = vk::ApplicationInfo::default()
            .application_name(c"dmaflow")
            .engine_name(c"dmaflow")
            .api_version(API_VERSION);
        let layers = [VALIDATION.as_ptr()];
        let extensions = [ext::debug_utils::NAME.as_ptr(), ext::validation_features::NAME.as_ptr()];
        let checks = [vk::ValidationFeatureEnableEXT::SYNCHRONIZATION_VALIDATION];
        let mut features = vk::ValidationFeaturesEXT::default().enabled_validation_features(&checks);
        let mut messenger = messages.as_ref().map(Messages::create_info);
        let mut info = vk::InstanceCreateInfo::default().application_info(&application);
        if let Some(messenger) = &mut messenger {
            // Once more in the chain: it hears what is said while the instance is made and destroyed.
            info = info
                .enabled_layer_names(&layers)
                .enabled_extension_names(&extensions)
                .push_next(&mut features)
                .push_next(messenger);
        }
        // SAFETY: everything that `info` points to lives until the end of this function.
        let raw =
            unsafe { entry.create_instance(&info, None) }.map_err(|result| no_instance("vkCreateInstance", result))?;
        let mut instance = Instance { raw, messenger: None, messages, _entry: entry };
        if let Some(messages) = &instance.messages {
            let utils = ext::debug_utils::Instance::new(&instance._entry, &instance.raw);
            // SAFETY: the extension is enabled above, and the messages live longer than the messenger (`Drop` below).
            let made = unsafe { utils.create_debug_utils_messenger(&messages.create_info(), None) };
            let made = made.map_err(|result| no_instance("vkCreateDebugUtilsMessengerEXT", result))?;
            instance.messenger = Some((utils, made));
        }
        Ok(instance)
    }

    /// The physical devices, as the drivers name them.
    ///
    /// # Errors
    /// What the loader says; no driver at all is no error, but an empty list.
    pub(super) fn physical_devices(&self) -> Result<Vec<vk::PhysicalDevice>> {
        // SAFETY: the instance lives.
        match unsafe { self.raw.enumerate_physical_devices() } {
            Err(vk::Result::ERROR_INITIALIZATION_FAILED) => Ok(Vec::new()),
            other => other.map_err(|result| failed("vkEnumeratePhysicalDevices", "list", "the GPUs", result)),
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: everything made of the instance is gone: `Gpu` holds it and destroys its device before. The messages, and the
        // loader's code, are dropped after this.
        unsafe {
            if let Some((utils, messenger)) = self.messenger.take() {
                utils.destroy_debug_utils_messenger(messenger, None);
            }
            self.raw.destroy_instance(None);
        }
    }
}

fn require_layer(entry: &ash::Entry) -> Result<()> {
    // SAFETY: no more than a loaded entry is needed.
    let layers = unsafe { entry.enumerate_instance_layer_properties() };
    let layers = layers.map_err(|result| no_instance("vkEnumerateInstanceLayerProperties", result))?;
    let there = layers.iter().any(|layer| layer.layer_name_as_c_str() == Ok(VALIDATION));
    there.then_some(()).ok_or_else(|| {
        Error::new(Kind::NotFound, "find", "the Vulkan validation layer")
            .repair("install it (Debian: vulkan-validationlayers), or run without it")
    })
}

fn no_instance(call: &'static str, result: vk::Result) -> Error {
    let error = failed(call, "start", "Vulkan", result);
    match result {
        // The loader's answer where no driver can be used.
        vk::Result::ERROR_INCOMPATIBLE_DRIVER => error
            .kind_is(Kind::NotFound)
            .meaning("there is no Vulkan driver for this machine")
            .repair("install one (Debian: mesa-vulkan-drivers)"),
        _ => error,
    }
}
