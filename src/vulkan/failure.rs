//! From a Vulkan result to an error or a refusal.

use ash::vk;

use crate::endpoint::{Refusal, Rung};
use crate::error::{Error, Kind};

/// The name of a result as the specification has it.
pub(super) fn code(result: vk::Result) -> String {
    format!("VK_{result:?}")
}

/// An error of `call`, with what the result means where it has one meaning ("Return Codes" of the specification).
pub(super) fn failed(call: &'static str, step: &'static str, subject: impl Into<String>, result: vk::Result) -> Error {
    use vk::Result as R;
    let kind = match result {
        R::ERROR_DEVICE_LOST => Kind::Disconnected,
        R::TIMEOUT => Kind::Timeout,
        R::ERROR_EXTENSION_NOT_PRESENT
        | R::ERROR_FEATURE_NOT_PRESENT
        | R::ERROR_FORMAT_NOT_SUPPORTED
        | R::ERROR_INCOMPATIBLE_DRIVER
        | R::ERROR_LAYER_NOT_PRESENT => Kind::Unsupported,
        _ => Kind::System,
    };
    let error = Error::new(kind, step, subject).because(code(result)).said_by(call);
    match result {
        R::ERROR_DEVICE_LOST => error
            .meaning("the GPU was reset, or is gone")
            .repair("the kernel log says why; start again"),
        R::ERROR_OUT_OF_DEVICE_MEMORY | R::ERROR_OUT_OF_HOST_MEMORY => {
            error.meaning("no memory is left").repair("use fewer or smaller buffers")
        }
        R::ERROR_TOO_MANY_OBJECTS => error.meaning("the driver makes no more of these").repair("use fewer buffers"),
        _ => error,
    }
}

/// A refusal of `step`, the name of the call or the check that said no.
pub(super) fn refuse(step: &'static str, why: impl Into<String>, repair: impl Into<String>) -> Refusal {
    Refusal { rung: Rung::Exported, step, errno: None, why: why.into(), repair: repair.into() }
}

/// What is said where other memory is the cure.
pub(super) const OTHER_MEMORY: &str =
    "let the camera capture into buffers that the GPU or a common allocator made, or let frames be copied";
