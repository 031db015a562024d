//! A camera's controls: brightness, exposure, and the faults that vivid can inject.

use std::os::fd::AsFd;

use v4l::v4l_sys as sys;

use super::{Device, raw};
use crate::error::{Context, Error, Kind, Result};

/// What sort of value a control takes. Sorts that are not here (strings, arrays) are listed as `Other`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ControlKind {
    /// A number of 32 bits.
    Integer,
    /// A number of 64 bits.
    Integer64,
    /// 0 or 1.
    Boolean,
    /// One of a list of names, or of numbers.
    Menu,
    /// Something that happens when it is set; it has no value.
    Button,
    /// A set of bits.
    Bitmask,
    /// A sort that this crate neither reads nor sets.
    Other,
}

/// One control.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Control {
    /// V4L2's number of it.
    pub id: u32,
    /// Its name as `v4l2-ctl` writes it: lower case, `_` for everything else, as in `inject_v4l2_buf_flag_error`.
    pub name: String,
    /// What sort of value it takes.
    pub kind: ControlKind,
    /// Least value.
    pub minimum: i64,
    /// Greatest value.
    pub maximum: i64,
    /// Step between values.
    pub step: u64,
    /// The driver's default.
    pub default: i64,
}

impl Device {
    /// All controls that are not disabled.
    ///
    /// # Errors
    /// What `VIDIOC_QUERY_EXT_CTRL` says, other than that there are no more.
    pub fn controls(&self) -> Result<Vec<Control>> {
        let mut controls = Vec::new();
        let mut query: sys::v4l2_query_ext_ctrl = raw::zeroed();
        loop {
            query.id |= sys::V4L2_CTRL_FLAG_NEXT_CTRL | sys::V4L2_CTRL_FLAG_NEXT_COMPOUND;
            match raw::query_control(self.as_fd(), &mut query) {
                Ok(()) => {}
                // EINVAL ends the list; a driver without any control answers ENOTTY.
                Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EINVAL | nix::libc::ENOTTY)) => {
                    return Ok(controls);
                }
                Err(error) => return Err(Error::from_io("list the controls of", self.name(), error)),
            }
            if query.flags & sys::V4L2_CTRL_FLAG_DISABLED == 0
                && query.type_ != sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_CTRL_CLASS
            {
                controls.push(describe(&query));
            }
        }
    }

    /// The control called `name`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if the camera has none of that name.
    pub fn control(&self, name: &str) -> Result<Control> {
        let found = self.controls()?.into_iter().find(|control| control.name == name);
        found.ok_or_else(|| Error::new(Kind::NotFound, "find", format!("the control {name} of {}", self.name())))
    }

    /// The value of a control.
    ///
    /// # Errors
    /// What `VIDIOC_G_EXT_CTRLS` says; [`Kind::Unsupported`] for a sort without a number.
    pub fn get_control(&self, control: &Control) -> Result<i64> {
        self.transfer(control, None, "read")
    }

    /// Sets a control; a button's value is not used.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a value outside of the range or between the steps, which the kernel would change without a word
    /// (`ROUND_TO_RANGE` in v4l2-ctrls-core.c). What `VIDIOC_S_EXT_CTRLS` says: `EBUSY` for one that cannot change while
    /// streaming, `EACCES` for one that is read-only. [`Kind::Unsupported`] for a sort without a number.
    pub fn set_control(&self, control: &Control, value: i64) -> Result<()> {
        if let Some(range) = control.refuses(value) {
            let error = Error::new(Kind::Invalid, "set", format!("the control {} of {}", control.name, self.name()));
            return Err(error.because(format!("{value} is not one of its values")).repair(range));
        }
        self.transfer(control, Some(value), "set").map(drop)
    }

    fn transfer(&self, control: &Control, value: Option<i64>, step: &'static str) -> Result<i64> {
        let subject = || format!("the control {} of {}", control.name, self.name());
        if control.kind == ControlKind::Other {
            return Err(Error::new(Kind::Unsupported, step, subject()).because("its values are not numbers"));
        }
        let wide = control.kind == ControlKind::Integer64;
        raw::control(self.as_fd(), control.id, wide, value).context(step, subject)
    }

    /// How many buffers the driver wants queued at least (`V4L2_CID_MIN_BUFFERS_FOR_CAPTURE`); 1 if it does not say.
    pub(super) fn minimum_buffers(&self) -> u32 {
        let minimum = raw::control(self.as_fd(), sys::V4L2_CID_MIN_BUFFERS_FOR_CAPTURE, false, None);
        minimum
            .ok()
            .and_then(|count| u32::try_from(count).ok())
            .map_or(1, |count| count.max(1))
    }
}

impl Control {
    /// What it takes instead, if it does not take `value`.
    fn refuses(&self, value: i64) -> Option<String> {
        let (minimum, maximum) = (self.minimum, self.maximum);
        match self.kind {
            ControlKind::Button | ControlKind::Other => None,
            // The maximum is the mask of the bits that are there, of 32; the minimum is 0 (v4l2_query_ext_ctrl).
            ControlKind::Bitmask => {
                let bits = maximum & i64::from(u32::MAX);
                (value & !bits != 0).then(|| format!("it takes the bits of {bits:#x}"))
            }
            ControlKind::Integer | ControlKind::Integer64 | ControlKind::Boolean | ControlKind::Menu => {
                let range = minimum..=maximum;
                // For a menu and a boolean the step is 1; a step of 0 is none.
                let between = range.contains(&value) && self.step > 1 && value.abs_diff(minimum) % self.step != 0;
                let steps = if self.step > 1 { format!(" in steps of {}", self.step) } else { String::new() };
                (!range.contains(&value) || between).then(|| format!("it takes {minimum} to {maximum}{steps}"))
            }
        }
    }
}

fn describe(query: &sys::v4l2_query_ext_ctrl) -> Control {
    let bytes = query.name.map(|c| c.cast_unsigned());
    let kind = match query.type_ {
        // A payload is more than one number, whatever the type of its elements.
        _ if query.flags & sys::V4L2_CTRL_FLAG_HAS_PAYLOAD != 0 => ControlKind::Other,
        sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_INTEGER => ControlKind::Integer,
        sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_INTEGER64 => ControlKind::Integer64,
        sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_BOOLEAN => ControlKind::Boolean,
        sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_MENU | sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_INTEGER_MENU => ControlKind::Menu,
        sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_BUTTON => ControlKind::Button,
        sys::v4l2_ctrl_type_V4L2_CTRL_TYPE_BITMASK => ControlKind::Bitmask,
        _ => ControlKind::Other,
    };
    Control {
        id: query.id,
        name: control_name(&raw::text(&bytes)),
        kind,
        minimum: query.minimum,
        maximum: query.maximum,
        step: query.step,
        default: query.default_value,
    }
}

/// The driver's words as one word: runs of anything but letters and digits become one `_`.
fn control_name(words: &str) -> String {
    let parts = words
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|part| !part.is_empty());
    parts.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("_")
}

#[cfg(test)]
mod tests {
    use super::{Control, ControlKind, control_name};

    #[test]
    fn values_that_would_be_changed_are_refused() {
        let refuses = |kind, (minimum, maximum), step, value| {
            Control { id: 1, name: "c".into(), kind, minimum, maximum, step, default: 0 }.refuses(value)
        };
        let number = |value| refuses(ControlKind::Integer, (-8, 9), 4, value);
        for value in [-8, -4, 0, 8] {
            assert_eq!(number(value), None, "{value}");
        }
        for value in [i64::MIN, -9, -7, 9, 12, i64::MAX] {
            assert_eq!(number(value).as_deref(), Some("it takes -8 to 9 in steps of 4"), "{value}");
        }
        let wide = |value| refuses(ControlKind::Integer64, (i64::MIN, i64::MAX), 1, value);
        assert!(wide(i64::MIN).is_none() && wide(i64::MAX).is_none());
        let mask = |value| refuses(ControlKind::Bitmask, (0, -0x7fff_fff0), 0, value);
        assert!(mask(0).is_none() && mask(0x8000_0000).is_none());
        assert_eq!(mask(0x8000_0001).as_deref(), Some("it takes the bits of 0x80000010"));
        assert!(refuses(ControlKind::Button, (0, 0), 0, 7).is_none());
        assert_eq!(refuses(ControlKind::Boolean, (0, 1), 1, 2).as_deref(), Some("it takes 0 to 1"));
    }

    #[test]
    fn names_are_those_of_v4l2_ctl() {
        assert_eq!(control_name("Inject V4L2_BUF_FLAG_ERROR"), "inject_v4l2_buf_flag_error");
        assert_eq!(control_name("White Balance, Automatic"), "white_balance_automatic");
    }
}
