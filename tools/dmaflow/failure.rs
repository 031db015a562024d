//! From an error to one line and an exit status.

use std::process::ExitCode;

use dmaflow::endpoint::Refusal;
use dmaflow::error::Kind;

pub const FAILED: u8 = 1;
pub const WRONG_USAGE: u8 = 2;
pub const ZERO_COPY_REFUSED: u8 = 3;
pub const WRONG_FRAME: u8 = 4;

/// What was asked for makes no sense: exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Zero copy was demanded and refused: exit status 3.
#[derive(Debug, thiserror::Error)]
#[error("zero copy was demanded and is not possible: {0}")]
pub struct ZeroCopyRefused(pub Refusal);

/// A failure after which the display could not be put back as it was, either.
#[derive(Debug, thiserror::Error)]
#[error("{first:#}")]
pub struct NotPutBack {
    first: anyhow::Error,
    also: dmaflow::Error,
}

impl NotPutBack {
    pub fn after(first: anyhow::Error, also: dmaflow::Error) -> anyhow::Error {
        NotPutBack { first, also }.into()
    }

    /// What is lost by that, in a few words: where the device is gone there is no picture to put back.
    fn words(&self) -> String {
        match (self.also.kind(), std::error::Error::source(&self.also)) {
            (Kind::Disconnected, _) => String::new(),
            (_, Some(cause)) => format!("; the picture of before was not put back ({cause})"),
            (_, None) => "; the picture of before was not put back".to_owned(),
        }
    }
}

/// The exit status for an error, and the line that explains it.
pub fn explain(error: &anyhow::Error) -> (ExitCode, String) {
    if let Some(both) = error.downcast_ref::<NotPutBack>() {
        let (status, line) = explain(&both.first);
        return (status, line + &both.words());
    }
    let status = if error.is::<Usage>() {
        WRONG_USAGE
    } else if error.is::<ZeroCopyRefused>() {
        ZERO_COPY_REFUSED
    } else {
        FAILED
    };
    let mut line = format!("{error:#}");
    let repair = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<dmaflow::Error>()?.known_repair());
    if let Some(repair) = repair {
        line.push_str("; ");
        line.push_str(repair);
    }
    (ExitCode::from(status), line)
}
