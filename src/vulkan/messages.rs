//! What the validation layer says.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ash::vk;

/// The messages of the validation layer so far. A clone outlives the GPU, so that those of its end are seen too.
///
/// One rule is passed over, with drivers that make the layer take it wrongly, and counted ([`Messages::passed_over`]):
/// `VUID-VkImageViewCreateInfo-None-02273` with lavapipe, of which the layer says for every view of an imported image that it has no format
/// features. The same is asked of the driver before each import.
#[derive(Clone, Debug, Default)]
pub struct Messages(Arc<Heard>);

#[derive(Debug, Default)]
struct Heard {
    all: Mutex<Vec<String>>,
    /// [`NO_FEATURES`] is false with this driver.
    lacks_second_list: AtomicBool,
    passed_over: AtomicUsize,
}

/// Says that a view has no format features. Of a view of an image with a modifier the layer looks them up in
/// `VkDrmFormatModifierPropertiesList2EXT` wherever the driver has `VK_KHR_format_feature_flags2` (`GetImageFormatFeatures`,
/// layers/state_tracker/state_tracker.cpp). lavapipe has it and fills the first list alone, `VkDrmFormatModifierPropertiesListEXT`
/// (`lvp_GetPhysicalDeviceFormatProperties2`, lvp_formats.c of Mesa 25.0), so the layer finds nothing and says so of every view there is.
/// Passed over with drivers that were seen to leave the second list empty (`Physical::lacks_second_list`), and with no other. What the
/// rule is about is checked before each import by the list that is filled (`Physical::offer`).
const NO_FEATURES: &[u8] = b"VUID-VkImageViewCreateInfo-None-02273";

/// More are counted as one: a wrong call in a loop must not eat the memory.
const MOST: usize = 100;

impl Messages {
    /// All of them, oldest first.
    pub fn all(&self) -> Vec<String> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many were passed over: the layer's own limit for one rule is 10 (`duplicate_message_limit`).
    pub fn passed_over(&self) -> usize {
        self.0.passed_over.load(Ordering::Relaxed)
    }

    /// The driver has been seen to leave empty the list of modifiers that the layer looks into.
    pub(super) fn pass_over_no_features(&self) {
        self.0.lacks_second_list.store(true, Ordering::Relaxed);
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
    let (heard, data) = unsafe { (user.cast::<Heard>().as_ref(), data.as_ref()) };
    if let (Some(heard), Some(data)) = (heard, data) {
        // SAFETY: both are null or null-terminated strings that live for the call (specification).
        let (id, text) = unsafe { (string(data.p_message_id_name), string(data.p_message)) };
        let no_features = id.is_some_and(|id| id.to_bytes() == NO_FEATURES);
        if no_features && heard.lacks_second_list.load(Ordering::Relaxed) {
            heard.passed_over.fetch_add(1, Ordering::Relaxed);
            return vk::FALSE;
        }
        let text = text.map_or_else(|| "a message without text".to_owned(), |text| text.to_string_lossy().into_owned());
        let mut all = heard.all.lock().unwrap_or_else(PoisonError::into_inner);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// As the layer calls it.
    fn say(messages: &Messages, id: &CStr, text: &CStr) {
        use vk::{DebugUtilsMessageSeverityFlagsEXT as Severity, DebugUtilsMessageTypeFlagsEXT as Type};
        let data = vk::DebugUtilsMessengerCallbackDataEXT::default()
            .message_id_name(id)
            .message(text);
        let user = Arc::as_ptr(&messages.0).cast_mut().cast();
        // SAFETY: both pointers are valid for the call, `user` as `create_info` gives it.
        let answer = unsafe { on_message(Severity::ERROR, Type::VALIDATION, &data, user) };
        assert_eq!(answer, vk::FALSE);
    }

    #[test]
    fn one_rule_is_passed_over_and_only_with_the_drivers_that_cause_it() {
        let messages = Messages::default();
        let false_one = c"VUID-VkImageViewCreateInfo-None-02273";
        say(&messages, false_one, c"heard");
        messages.pass_over_no_features();
        say(&messages, false_one, c"passed over");
        say(&messages, c"VUID-VkImageViewCreateInfo-None-02273 ", c"another");
        say(&messages, c"VUID-VkImageViewCreateInfo-usage-02274", c"yet another");
        assert_eq!(messages.all(), ["heard", "another", "yet another"]);
        assert_eq!(messages.passed_over(), 1);
    }

    #[test]
    fn a_flood_is_cut() {
        let messages = Messages::default();
        (0..2 * MOST).for_each(|_| say(&messages, c"VUID", c"wet"));
        let all = messages.clone().all();
        assert_eq!((all.len(), all.last().map(String::as_str)), (MOST + 1, Some("and more")));
    }
}
