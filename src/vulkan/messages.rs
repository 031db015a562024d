//! What the validation layer says.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use ash::vk;

/// The messages of the validation layer so far. A clone outlives the GPU, so that those of its end are seen too.
#[derive(Clone, Debug, Default)]
pub struct Messages(Arc<Mutex<Vec<String>>>);

/// Says that a view of a tiled image has no format features. The layer asks `VkDrmFormatModifierPropertiesList2EXT` for them, which drivers
/// of Mesa 25.0 (lavapipe) leave empty, so that it says so of every view. The features are checked before each import by the list that all
/// drivers fill (`Physical::offer`), so nothing is lost by passing it over.
const NOT_FILLED: &[u8] = b"VUID-VkImageViewCreateInfo-None-02273";

/// More are counted as one: a wrong call in a loop must not eat the memory.
const MOST: usize = 100;

impl Messages {
    /// All of them, oldest first.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A messenger that writes here: warnings and errors of validation and of performance. Not the loader's, which tells of drivers
    /// that it passes over.
    pub(super) fn create_info(&self) -> vk::DebugUtilsMessengerCreateInfoEXT<'static> {
        use vk::{DebugUtilsMessageSeverityFlagsEXT as Severity, DebugUtilsMessageTypeFlagsEXT as Type};
        vk::DebugUtilsMessengerCreateInfoEXT::default()
            .message_severity(Severity::WARNING | Severity::ERROR)
            .message_type(Type::VALIDATION | Type::PERFORMANCE)
            .pfn_user_callback(Some(on_message))
            .user_data(Arc::as_ptr(&self.0).cast_mut().cast())
    }
}

/// `PFN_vkDebugUtilsMessengerCallbackEXT`: called in the course of other calls, from any thread.
unsafe extern "system" fn on_message(
    _: vk::DebugUtilsMessageSeverityFlagsEXT,
    _: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: `user` is the pointer that `create_info` gave: of an `Arc` that the owner of the messenger holds longer than it
    // (`Instance` drops its fields after the instance is destroyed). `data` is null or valid for the call (specification).
    let (messages, data) = unsafe { (user.cast::<Mutex<Vec<String>>>().as_ref(), data.as_ref()) };
    if let (Some(messages), Some(data)) = (messages, data) {
        // SAFETY: both are null or null-terminated strings that live for the call (specification).
        let (id, text) = unsafe { (string(data.p_message_id_name), string(data.p_message)) };
        if id.is_some_and(|id| id.to_bytes() == NOT_FILLED) {
            return vk::FALSE;
        }
        let text = text.map_or_else(|| "a message without text".to_owned(), |text| text.to_string_lossy().into_owned());
        let mut all = messages.lock().unwrap_or_else(PoisonError::into_inner);
        match all.len() {
            0..MOST => all.push(text),
            MOST => all.push("and more".to_owned()),
            _ => {}
        }
    }
    // An application must return VK_FALSE.
    vk::FALSE
}

/// # Safety
/// `text` is null, or a null-terminated string that lives as long as the result is used.
unsafe fn string<'a>(text: *const c_char) -> Option<&'a CStr> {
    // SAFETY: by this function's contract.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
}
