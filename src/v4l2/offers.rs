//! What a camera offers: formats, sizes, rates, inputs.

use std::fmt;
use std::io;

use nix::libc;
use v4l::v4l_sys as sys;

use super::{Device, raw};
use crate::error::{Context, Result};
use crate::format::{Format, Fourcc};
use std::os::fd::AsFd;

/// A format that a camera offers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FormatOffer {
    /// V4L2's code.
    pub code: Fourcc,
    /// The format and its number of memory planes, where it is one of [`Format`]'s.
    pub known: Option<(Format, u32)>,
    /// The driver's words.
    pub description: String,
    /// Whether frames are compressed.
    pub compressed: bool,
    /// Whether a library, not the device, makes it.
    pub emulated: bool,
}

/// Sizes that a camera offers in one format, in pixels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sizes {
    /// One size.
    Discrete(u32, u32),
    /// All sizes from `min` to `max` in steps of `step`.
    Stepwise {
        /// Least width and height.
        min: (u32, u32),
        /// Greatest width and height.
        max: (u32, u32),
        /// Steps of width and height; at least 1.
        step: (u32, u32),
    },
}

impl Sizes {
    /// The offered size nearest to `wanted`.
    pub fn nearest(self, wanted: (u32, u32)) -> (u32, u32) {
        match self {
            Sizes::Discrete(width, height) => (width, height),
            Sizes::Stepwise { min, max, step } => {
                (snap(wanted.0, min.0, max.0, step.0), snap(wanted.1, min.1, max.1, step.1))
            }
        }
    }
}

/// The value nearest to `wanted` of those from `min` to `max` in steps of `step`.
fn snap(wanted: u32, min: u32, max: u32, step: u32) -> u32 {
    let step = step.max(1);
    let wanted = wanted.clamp(min, max.max(min));
    let steps = (wanted - min + step / 2) / step;
    let value = min + steps * step;
    if value > max { value - step } else { value }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sizes::Discrete(width, height) => write!(f, "{width}x{height}"),
            Sizes::Stepwise { min, max, step } => {
                write!(f, "{}x{} to {}x{}", min.0, min.1, max.0, max.1)?;
                if *step == (1, 1) { Ok(()) } else { write!(f, " in steps of {}x{}", step.0, step.1) }
            }
        }
    }
}

/// Frames a second as the fraction that V4L2 uses: `numerator / denominator` seconds a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Numerator of the seconds a frame.
    pub numerator: u32,
    /// Denominator of the seconds a frame.
    pub denominator: u32,
}

impl Rate {
    /// The fraction nearest to `fps` frames a second, exact to a thousandth.
    pub fn from_fps(fps: f64) -> Rate {
        let scaled = (fps * 1000.0).round().clamp(1.0, f64::from(u32::MAX));
        // Clamped to the range just above, so that nothing is cut off.
        let denominator = scaled as u32;
        let shared = gcd(1000, denominator);
        Rate { numerator: 1000 / shared, denominator: denominator / shared }
    }

    /// Frames a second; `None` for a fraction with a zero.
    pub fn fps(self) -> Option<f64> {
        let whole = self.numerator > 0 && self.denominator > 0;
        whole.then(|| f64::from(self.denominator) / f64::from(self.numerator))
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fps() {
            Some(fps) => write!(f, "{}", (fps * 1000.0).round() / 1000.0),
            None => f.write_str("unknown"),
        }
    }
}

/// Rates that a camera offers in one format at one size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rates {
    /// One rate.
    Discrete(Rate),
    /// All rates between the two.
    Stepwise {
        /// The slowest.
        slowest: Rate,
        /// The fastest.
        fastest: Rate,
    },
}

impl Rates {
    /// The offered rate nearest to `fps`, in frames a second.
    pub fn nearest(self, fps: f64) -> Option<f64> {
        match self {
            Rates::Discrete(rate) => rate.fps(),
            Rates::Stepwise { slowest, fastest } => Some(fps.clamp(slowest.fps()?, fastest.fps()?.max(slowest.fps()?))),
        }
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rates::Discrete(rate) => write!(f, "{rate}"),
            Rates::Stepwise { slowest, fastest } => write!(f, "{slowest} to {fastest}"),
        }
    }
}

/// An input of a camera (a connector of a capture card).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Input {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
}

/// Calls `next` with 0, 1, … until the driver says that there is no more (`EINVAL`); a driver without that enumeration
/// (`ENOTTY`) has none.
fn enumerate<T>(mut next: impl FnMut(u32) -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for index in 0.. {
        match next(index) {
            Ok(item) => found.push(item),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY | libc::ENODATA)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

impl Device {
    /// The formats that the camera offers, in its order.
    ///
    /// # Errors
    /// What `VIDIOC_ENUM_FMT` says.
    pub fn formats(&self) -> Result<Vec<FormatOffer>> {
        let offers = enumerate(|index| {
            let mut desc: sys::v4l2_fmtdesc = raw::zeroed();
            desc.index = index;
            desc.type_ = self.info().api.buffer_type();
            raw::enum_format(self.as_fd(), &mut desc)?;
            let code = Fourcc(desc.pixelformat);
            Ok(FormatOffer {
                code,
                known: Format::from_v4l2(code),
                description: raw::text(&desc.description),
                compressed: desc.flags & sys::V4L2_FMT_FLAG_COMPRESSED != 0,
                emulated: desc.flags & sys::V4L2_FMT_FLAG_EMULATED != 0,
            })
        });
        offers.context("list the formats of", || self.name())
    }

    /// The sizes that the camera offers in a format; none if the driver does not tell.
    ///
    /// # Errors
    /// What `VIDIOC_ENUM_FRAMESIZES` says.
    pub fn sizes(&self, code: Fourcc) -> Result<Vec<Sizes>> {
        let sizes = enumerate(|index| {
            let mut size: sys::v4l2_frmsizeenum = raw::zeroed();
            size.index = index;
            size.pixel_format = code.0;
            raw::enum_frame_size(self.as_fd(), &mut size)?;
            if size.type_ == sys::v4l2_frmsizetypes_V4L2_FRMSIZE_TYPE_DISCRETE {
                // SAFETY: the type says that `discrete` was written; all fields are integers, and the union was zeroed.
                let discrete = unsafe { size.__bindgen_anon_1.discrete };
                return Ok((Sizes::Discrete(discrete.width, discrete.height), false));
            }
            // SAFETY: the type says that `stepwise` was written; all fields are integers, and the union was zeroed.
            let step = unsafe { size.__bindgen_anon_1.stepwise };
            let sizes = Sizes::Stepwise {
                min: (step.min_width, step.min_height),
                max: (step.max_width, step.max_height),
                step: (step.step_width.max(1), step.step_height.max(1)),
            };
            Ok((sizes, true))
        });
        let sizes = sizes.context("list the sizes of", || self.name())?;
        Ok(only_one_range(sizes))
    }

    /// The rates that the camera offers in a format at a size; none if the driver does not tell.
    ///
    /// # Errors
    /// What `VIDIOC_ENUM_FRAMEINTERVALS` says.
    pub fn rates(&self, code: Fourcc, (width, height): (u32, u32)) -> Result<Vec<Rates>> {
        let rates = enumerate(|index| {
            let mut interval: sys::v4l2_frmivalenum = raw::zeroed();
            interval.index = index;
            interval.pixel_format = code.0;
            interval.width = width;
            interval.height = height;
            raw::enum_frame_interval(self.as_fd(), &mut interval)?;
            let rate = |fract: sys::v4l2_fract| Rate { numerator: fract.numerator, denominator: fract.denominator };
            if interval.type_ == sys::v4l2_frmivaltypes_V4L2_FRMIVAL_TYPE_DISCRETE {
                // SAFETY: the type says that `discrete` was written; all fields are integers, and the union was zeroed.
                return Ok((Rates::Discrete(rate(unsafe { interval.__bindgen_anon_1.discrete })), false));
            }
            // SAFETY: the type says that `stepwise` was written; all fields are integers, and the union was zeroed.
            let step = unsafe { interval.__bindgen_anon_1.stepwise };
            // The longest interval is the slowest rate.
            Ok((Rates::Stepwise { slowest: rate(step.max), fastest: rate(step.min) }, true))
        });
        let rates = rates.context("list the rates of", || self.name())?;
        Ok(only_one_range(rates))
    }

    /// The inputs of the camera.
    ///
    /// # Errors
    /// What `VIDIOC_ENUMINPUT` says.
    pub fn inputs(&self) -> Result<Vec<Input>> {
        let inputs = enumerate(|index| {
            let mut input: sys::v4l2_input = raw::zeroed();
            input.index = index;
            raw::enum_input(self.as_fd(), &mut input)?;
            Ok(Input { index, name: raw::text(&input.name) })
        });
        inputs.context("list the inputs of", || self.name())
    }

    /// Chooses an input. This may change the format, so it goes first.
    ///
    /// # Errors
    /// What `VIDIOC_S_INPUT` says: `EINVAL` for one that is not there, `EBUSY` while streaming.
    pub fn set_input(&self, index: u32) -> Result<()> {
        let mut argument = i32::try_from(index).unwrap_or(i32::MAX);
        let set = raw::set_input(self.as_fd(), &mut argument);
        set.context("choose the input of", || self.name())
            .map_err(|error| error.repair(format!("it has inputs {}", self.input_names())))
    }

    /// The inputs for a message: number and name.
    pub(super) fn input_names(&self) -> String {
        let inputs = self.inputs().unwrap_or_default();
        let names: Vec<_> = inputs.iter().map(|input| format!("{} ({})", input.index, input.name)).collect();
        names.join(", ")
    }
}

/// A range is a driver's only entry, and some drivers answer every further index with it again.
fn only_one_range<T>(entries: Vec<(T, bool)>) -> Vec<T> {
    let range = entries.iter().position(|(_, range)| *range);
    let count = range.map_or(entries.len(), |at| at + 1);
    entries.into_iter().take(count).map(|(entry, _)| entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_sizes() {
        let step = Sizes::Stepwise { min: (48, 32), max: (1920, 1080), step: (16, 8) };
        assert_eq!(step.nearest((641, 361)), (640, 360));
        assert_eq!(step.nearest((1, 9000)), (48, 1080));
        assert_eq!(Sizes::Discrete(1, 2).nearest((9, 9)), (1, 2));
        assert_eq!(snap(u32::MAX, 0, u32::MAX, 1), u32::MAX);
    }

    #[test]
    fn rates_are_exact_fractions() {
        assert_eq!(Rate::from_fps(60.0), Rate { numerator: 1, denominator: 60 });
        assert_eq!(Rate::from_fps(29.97), Rate { numerator: 100, denominator: 2997 });
        assert_eq!(Rate::from_fps(59.94).to_string(), "59.94");
        assert_eq!(Rate { numerator: 0, denominator: 1 }.fps(), None);
        let range = Rates::Stepwise { slowest: Rate::from_fps(1.0), fastest: Rate::from_fps(30.0) };
        assert_eq!(range.nearest(60.0), Some(30.0));
    }
}
