//! `y4m:FILE` and `y4m:-`: a YUV4MPEG2 stream, which FFmpeg, mpv and most encoders read.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::stream::{self, Stream};
use crate::endpoint::{JoinError, Rung, Shown, Sink};
use crate::error::Result;
use crate::format::{Format, Kind, Layout, MAX_PLANES, Range};
use crate::frame::{Buffer, Frame, Room};
use crate::ledger::Ledger;

/// A [`Sink`] that writes a YUV4MPEG2 stream: a line with size, rate, subsampling and range, and before each frame the word `FRAME`.
///
/// It takes planar YUV of 8 bits and grey, as the stream has them; a camera that has none is converted before (packed and semi-planar YUV,
/// by the [ladder](crate::ladder)). RGB is refused. The stream cannot say which matrix (BT.601, BT.709) the samples are meant for.
///
/// How its bytes go, and when it waits: as [`Raw`](super::Raw).
#[derive(Debug)]
pub struct Y4m {
    stream: Stream,
    /// What goes before the first frame.
    head: String,
}

/// Before every frame.
const FRAME: &[u8] = b"FRAME\n";

impl Y4m {
    /// The cause of copies into a file in the [`Ledger`].
    pub const INTO_FILE: &'static str = stream::INTO_FILE;
    /// The cause of copies into a pipe or a socket.
    pub const INTO_PIPE: &'static str = stream::INTO_PIPE;

    /// A sink that will write to the file `place`, or to stdout for `-`; as [`Raw::new`](super::Raw::new).
    pub fn new(place: impl AsRef<Path>) -> Y4m {
        Y4m { stream: Stream::new("y4m", place.as_ref()), head: String::new() }
    }

    /// As [`Raw::stop_at`](super::Raw::stop_at).
    #[must_use]
    pub fn stop_at(mut self, stop: OwnedFd) -> Y4m {
        self.stream.stop_at(stop);
        self
    }

    /// As [`Raw::by_copy`](super::Raw::by_copy).
    #[must_use]
    pub fn by_copy(mut self) -> Y4m {
        self.stream.by_copy();
        self
    }
}

impl Sink for Y4m {
    fn name(&self) -> &str {
        self.stream.name()
    }

    fn formats(&self) -> Option<Vec<Format>> {
        Some(Format::all().filter(|&format| colour_space(format).is_some()).collect())
    }

    fn join(&mut self, layout: &Layout, rate: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        let format = layout.format();
        let Some(space) = colour_space(format) else {
            return Err(JoinError::Refused(crate::endpoint::Refusal {
                rung: Rung::Exported,
                step: "format",
                errno: None,
                why: format!("a YUV4MPEG2 stream has planar YUV of 8 bits or grey, and no {format}"),
                repair: "ask the source for planar YUV (--format YU12), or write the pixels as they are (raw:)"
                    .to_owned(),
            }));
        };
        let rung = self.stream.join(layout, order(format), buffers)?;
        self.head = head(layout, rate, space);
        Ok(rung)
    }

    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        self.stream.allocate(layout, room, count)
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        let head = if self.stream.has_begun() { "" } else { &self.head };
        self.stream.send(head.as_bytes(), FRAME, frame).map(Some)
    }

    /// Frames that who shares them took back after they had gone into the pipe and before all of them was read.
    fn dropped(&self) -> u64 {
        self.stream.torn()
    }

    fn imports(&self) -> u64 {
        self.stream.imports()
    }

    fn ledger(&self) -> &Ledger {
        self.stream.ledger()
    }
}

/// The stream's word for a format's subsampling; `None` for formats that it does not have.
fn colour_space(format: Format) -> Option<&'static str> {
    match (format.kind(), format.subsampling()) {
        (Kind::Grey, _) if format.row_bytes(0, 1) == 1 => Some("mono"),
        (Kind::Planar { .. }, (2, 2)) => Some("420jpeg"),
        (Kind::Planar { .. }, (2, 1)) => Some("422"),
        (Kind::Planar { .. }, (1, 1)) => Some("444"),
        _ => None,
    }
}

/// Y, U, V.
fn order(format: Format) -> [usize; MAX_PLANES] {
    match format.kind() {
        Kind::Planar { swapped: true } => [0, 2, 1, 3],
        _ => [0, 1, 2, 3],
    }
}

fn head(layout: &Layout, rate: Option<f64>, space: &str) -> String {
    let (numerator, denominator) = rate.map_or((0, 0), fraction);
    let full = layout.format().kind() == Kind::Grey || layout.colour().range == Range::Full;
    let range = if full { "FULL" } else { "LIMITED" };
    format!(
        "YUV4MPEG2 W{} H{} F{numerator}:{denominator} Ip A0:0 C{space} XCOLORRANGE={range}\n",
        layout.width(),
        layout.height()
    )
}

/// A rate as a fraction: whole numbers, those of television (30000/1001), else thousandths. 0:0 is "not known".
fn fraction(rate: f64) -> (u64, u64) {
    for (scale, denominator) in [(1.0, 1), (1.001, 1001), (1000.0, 1000)] {
        let scaled = rate * scale;
        let whole = scaled.round();
        if (scaled - whole).abs() < 1e-4 * whole && (1.0..1e9).contains(&whole) {
            let numerator = whole as u64 * if denominator == 1001 { 1000 } else { 1 };
            return reduce(numerator, denominator);
        }
    }
    (0, 0)
}

fn reduce(numerator: u64, denominator: u64) -> (u64, u64) {
    let (mut a, mut b) = (numerator, denominator);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    (numerator / a.max(1), denominator / a.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_fractions() {
        for (rate, expected) in [
            (60.0, (60, 1)),
            (30000.0 / 1001.0, (30000, 1001)),
            (59.94006, (60000, 1001)),
            (12.5, (25, 2)),
            (0.0, (0, 0)),
            (f64::NAN, (0, 0)),
            (f64::INFINITY, (0, 0)),
        ] {
            assert_eq!(fraction(rate), expected, "{rate}");
        }
    }

    #[test]
    fn only_what_the_stream_has_is_taken() {
        let names: Vec<_> = Y4m::new("-")
            .formats()
            .unwrap_or_default()
            .iter()
            .map(Format::to_string)
            .collect();
        for name in ["YU12", "YV12", "YU16", "YU24", "GREY"] {
            assert!(names.iter().any(|taken| taken == name), "{names:?}");
        }
        assert!(
            !names
                .iter()
                .any(|taken| ["XR24", "NV12", "YUYV", "P010"].contains(&taken.as_str())),
            "{names:?}"
        );
    }
}
