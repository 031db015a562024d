//! The crate's one error: what was attempted, on what, why it failed, and what to do about it.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// A `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is, for programs that react to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// No such device, node, format, mode or connector.
    NotFound,
    /// The device is there and cannot do this (not a capture device, no atomic modesetting, a format that it lacks).
    Unsupported,
    /// The process may not do this.
    Permission,
    /// Somebody else has it: DRM master, a queue that streams.
    Busy,
    /// The device went away while in use.
    Disconnected,
    /// Nothing came in the time allowed.
    Timeout,
    /// The stream ended: the source has no more frames.
    Ended,
    /// The source changed its format; the stream must be set up anew.
    FormatChanged,
    /// The frame was taken back by who shares it: it was kept for longer than its lease.
    Revoked,
    /// A value given by the caller makes no sense.
    Invalid,
    /// The system refused: out of memory, file descriptors, or an error of the device.
    System,
}

/// A failure as a value: step, subject, cause and, where one is known, the repair.
///
/// `Display` gives `step subject`, and the repair if there is no cause; the cause is in [`source`](StdError::source) so
/// that chains (`{:#}` of `anyhow`) do not say it twice.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    step: &'static str,
    subject: String,
    cause: Option<Box<dyn StdError + Send + Sync>>,
    repair: Option<String>,
    call: Option<&'static str>,
    meaning: Option<&'static str>,
    of_fence: bool,
}

impl Error {
    /// An error without a system cause. `step` reads as "cannot …": `"set the format of"`.
    pub fn new(kind: Kind, step: &'static str, subject: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            step,
            subject: subject.into(),
            cause: None,
            repair: None,
            call: None,
            meaning: None,
            of_fence: false,
        }))
    }

    /// An error with the system's answer; its kind follows from the errno.
    pub fn from_io(step: &'static str, subject: impl Into<String>, cause: io::Error) -> Error {
        let kind = kind_of(&cause);
        Error::new(kind, step, subject).because(cause)
    }

    /// Adds the cause: another error or a sentence.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
        self.0.cause = Some(cause.into());
        self
    }

    /// Adds what the reader can do about it.
    #[must_use]
    pub fn repair(mut self, repair: impl Into<String>) -> Error {
        self.0.repair = Some(repair.into());
        self
    }

    /// Names the call that failed, as people look it up: `VIDIOC_QBUF`.
    #[must_use]
    pub fn said_by(mut self, call: &'static str) -> Error {
        self.0.call = Some(call);
        self
    }

    /// The same with another kind.
    #[must_use]
    pub fn kind_is(mut self, kind: Kind) -> Error {
        self.0.kind = kind;
        self
    }

    /// Says that a fence failed or took too long.
    #[must_use]
    pub(crate) fn of_fence(mut self) -> Error {
        self.0.of_fence = true;
        self
    }

    /// Whether it is the failure of a [fence](crate::fence), which is named: the work that it stands for has failed, as when a GPU was reset
    /// ([`Kind::System`]), or it has not signalled in the time allowed ([`Kind::Timeout`]). That costs the frame of that fence, or in fifo
    /// the one behind it, and not the device: the next frame may be as good as any.
    pub fn is_of_fence(&self) -> bool {
        self.0.of_fence
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What was attempted.
    pub fn step(&self) -> &'static str {
        self.0.step
    }

    /// Says what the system's answer means here, where that is known better than its number says.
    #[must_use]
    pub(crate) fn meaning(mut self, meaning: &'static str) -> Error {
        self.0.meaning = Some(meaning);
        self
    }

    /// What the system's answer means here, where that is known.
    pub fn known_meaning(&self) -> Option<&'static str> {
        self.0.meaning
    }

    /// The call that failed, where it is known.
    pub fn call(&self) -> Option<&'static str> {
        self.0.call
    }

    /// On what.
    pub fn subject(&self) -> &str {
        &self.0.subject
    }

    /// What to do about it, where that is known.
    pub fn known_repair(&self) -> Option<&str> {
        self.0.repair.as_deref()
    }

    /// The errno at the bottom of the chain, if the system gave one.
    pub fn errno(&self) -> Option<i32> {
        let mut cause: Option<&(dyn StdError + 'static)> = self.0.cause.as_deref().map(|c| c as _);
        while let Some(error) = cause {
            if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                return Some(errno);
            }
            cause = error.source();
        }
        None
    }

    /// Step, subject, all causes and their meaning on one line, then the repair: what a person should see.
    pub fn line(&self) -> String {
        let mut line = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        if let Some(meaning) = self.0.meaning {
            line.push_str(": ");
            line.push_str(meaning);
        }
        if let Some(repair) = &self.0.repair {
            line.push_str(" (");
            line.push_str(repair);
            line.push(')');
        }
        line
    }
}

/// The kind that an errno stands for where nothing more is known.
fn kind_of(cause: &io::Error) -> Kind {
    use nix::libc;
    match cause.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO) => Kind::NotFound,
        Some(libc::EACCES | libc::EPERM) => Kind::Permission,
        Some(libc::EBUSY) => Kind::Busy,
        Some(libc::ENODEV) => Kind::Disconnected,
        Some(libc::ENOTTY | libc::EOPNOTSUPP) => Kind::Unsupported,
        Some(libc::ETIMEDOUT) => Kind::Timeout,
        _ => Kind::System,
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {} {}", self.0.step, self.0.subject)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.line())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.cause.as_deref().map(|cause| cause as _)
    }
}

/// Attaches step and subject to a system call's result.
pub(crate) trait Context<T> {
    /// Names what was attempted; `subject` is only made on failure.
    fn context<S: Into<String>>(self, step: &'static str, subject: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context<S: Into<String>>(self, step: &'static str, subject: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error::from_io(step, subject(), cause.into()))
    }
}

/// The symbol of an errno, as in `EINVAL`.
pub fn errno_name(errno: i32) -> String {
    match nix::errno::Errno::from_raw(errno) {
        nix::errno::Errno::UnknownErrno => errno.to_string(),
        known => format!("{known:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_step_subject_cause_and_repair() {
        let cause = io::Error::from_raw_os_error(nix::libc::EBUSY);
        let error = Error::from_io("become DRM master of", "/dev/dri/card0", cause).repair("stop it");
        assert_eq!(error.kind(), Kind::Busy);
        assert_eq!(error.errno(), Some(nix::libc::EBUSY));
        assert_eq!(
            error.line(),
            "cannot become DRM master of /dev/dri/card0: Device or resource busy (os error 16) (stop it)"
        );
    }
}
