//! Four-character codes and memory tiling, as V4L2 and DRM write them.

use std::fmt;
use std::str::FromStr;

/// A four-character pixel format code, as used by V4L2 (`V4L2_PIX_FMT_*`) and DRM (`DRM_FORMAT_*`).
///
/// The two namespaces differ: DRM's `RG16` is V4L2's `RGBP`. A bare `Fourcc` does not say which one it is from;
/// [`Format`](super::Format) keeps both.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fourcc(pub u32);

impl Fourcc {
    /// The code made of four ASCII characters, first character in the lowest byte (`v4l2_fourcc`, `fourcc_code`).
    pub const fn new(code: &[u8; 4]) -> Fourcc {
        Fourcc(u32::from_le_bytes(*code))
    }
}

impl fmt::Display for Fourcc {
    /// Four characters, trailing spaces cut; bit 31 (V4L2's and DRM's mark of big-endian order) becomes `-BE`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = (self.0 & 0x7fff_ffff).to_le_bytes();
        let text: String = bytes
            .iter()
            .map(|&b| if b.is_ascii_graphic() || b == b' ' { b as char } else { '?' })
            .collect();
        let big_endian = if self.0 & 0x8000_0000 != 0 { "-BE" } else { "" };
        f.pad(&format!("{}{big_endian}", text.trim_end()))
    }
}

impl fmt::Debug for Fourcc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fourcc({self})")
    }
}

/// A string that is not a four-character code.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a four-character code such as XR24 or NV12")]
pub struct ParseFourccError(pub String);

impl FromStr for Fourcc {
    type Err = ParseFourccError;

    /// Three or four printable ASCII characters; three are padded with a space, as the kernel does for `Y8`-like codes.
    fn from_str(text: &str) -> Result<Fourcc, ParseFourccError> {
        let fail = || ParseFourccError(text.to_owned());
        let (code, big_endian) = match text.strip_suffix("-BE") {
            Some(code) => (code, 0x8000_0000),
            None => (text, 0),
        };
        if !(3..=4).contains(&code.len()) || !code.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(fail());
        }
        let mut bytes = [b' '; 4];
        bytes[..code.len()].copy_from_slice(code.as_bytes());
        Ok(Fourcc(Fourcc::new(&bytes).0 | big_endian))
    }
}

/// A stated memory layout of a buffer's pixels (`DRM_FORMAT_MOD_*` in `drm_fourcc.h`).
///
/// "Not stated" is `Option::<Modifier>::None`; `DRM_FORMAT_MOD_INVALID` never appears as a `Modifier`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Modifier(u64);

impl Modifier {
    /// Rows one after the other, `stride` bytes apart (`DRM_FORMAT_MOD_LINEAR`).
    pub const LINEAR: Modifier = Modifier(0);

    /// The modifier that DRM writes as `raw`; `None` for `DRM_FORMAT_MOD_INVALID`, which states nothing.
    pub const fn from_drm(raw: u64) -> Option<Modifier> {
        if raw == 0x00ff_ffff_ffff_ffff { None } else { Some(Modifier(raw)) }
    }

    /// The number that DRM uses for this modifier.
    pub const fn to_drm(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Modifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Modifier::LINEAR => f.pad("LINEAR"),
            Modifier(raw) => write!(f, "{raw:#018x}"),
        }
    }
}

impl fmt::Debug for Modifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Modifier({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn codes_read_as_the_kernel_writes_them() {
        assert_eq!(Fourcc::new(b"XR24").0, 0x3432_5258);
        assert_eq!(Fourcc::new(b"XR24").to_string(), "XR24");
        assert_eq!("Y8".parse::<Fourcc>(), Err(ParseFourccError("Y8".into())));
        assert_eq!("RG16-BE".parse::<Fourcc>().unwrap().to_string(), "RG16-BE");
    }

    #[test]
    fn invalid_is_not_a_modifier() {
        assert_eq!(Modifier::from_drm(0x00ff_ffff_ffff_ffff), None);
        assert_eq!(Modifier::from_drm(0), Some(Modifier::LINEAR));
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(code in "[!-,.-~]{4}") {
            prop_assert_eq!(code.parse::<Fourcc>().unwrap().to_string(), code);
        }
    }
}
