//! What a camera and a program agree on before frames flow: format, size, stride, rate.

use std::os::fd::AsFd;

use v4l::v4l_sys as sys;

use super::camera::{CameraRequest, RateRequest};
use super::{Api, Device, FormatOffer, Rate, Rates, raw};
use crate::causes::Call;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Colour, Format, Fourcc, Kind as Samples, Layout, MAX_PLANES};

/// Two rates that differ by this share or less are one: people and drivers round (29.97 for 30000/1001, 23.98 for 24000/1001; UVC
/// counts in 100 ns). Half of the thousandth that is between 29.97 and 30, which are two.
const SAME_RATE: f64 = 0.0005;

impl Device {
    /// The layout that the camera would deliver now, if its format is a known one. Changes nothing.
    ///
    /// # Errors
    /// What `VIDIOC_G_FMT` says; [`Kind::Unsupported`] for a format that is not in [`Format`]'s table.
    pub fn current_layout(&self) -> Result<Layout> {
        read_layout(self, &current_format(self)?)
    }
}

/// The bytes that the driver wants of each memory plane for the format that it has (`sizeimage`).
///
/// # Errors
/// What `VIDIOC_G_FMT` says.
pub(super) fn memory_lens(device: &Device) -> Result<Vec<usize>> {
    let format = current_format(device)?;
    Ok(match device.info().api {
        Api::SinglePlanar => {
            // SAFETY: `type_` is the single-planar type, for which the kernel wrote `pix`; all its fields are integers.
            vec![unsafe { format.fmt.pix }.sizeimage as usize]
        }
        Api::MultiPlanar => {
            // SAFETY: `type_` is the multi-planar type, for which the kernel wrote `pix_mp`; all its fields are integers.
            let pix = unsafe { format.fmt.pix_mp };
            let planes = pix.plane_fmt;
            planes
                .iter()
                .take(usize::from(pix.num_planes))
                .map(|plane| plane.sizeimage as usize)
                .collect()
        }
    })
}

pub(super) fn current_format(device: &Device) -> Result<sys::v4l2_format> {
    let mut current: sys::v4l2_format = raw::zeroed();
    current.type_ = device.info().api.buffer_type();
    raw::get_format(device.as_fd(), &mut current).context("ask the format of", || device.name())?;
    Ok(current)
}

/// Sets the format, if anything is asked, and reads the driver's reply.
pub(super) fn agree_format(device: &Device, request: &CameraRequest) -> Result<Layout> {
    agree(device, request, &[request.stride.unwrap_or(0); MAX_PLANES], true)
}

/// Asks for the strides of a layout, the first colour plane's in each memory plane, and reads the driver's reply.
pub(super) fn agree_strides(device: &Device, wished: &Layout) -> Result<Layout> {
    let mut strides = [0; MAX_PLANES];
    for place in wished.planes().iter().rev() {
        if let Some(stride) = strides.get_mut(place.memory as usize) {
            *stride = place.stride;
        }
    }
    agree(device, &CameraRequest { stride: Some(strides[0]), ..CameraRequest::default() }, &strides, false)
}

/// `strides` are by memory plane; 0 is what the driver likes. Where they are not `exact`, the driver may have others.
fn agree(device: &Device, request: &CameraRequest, strides: &[u32; MAX_PLANES], exact: bool) -> Result<Layout> {
    let mut format = current_format(device)?;
    let code = match (request.code, request.format) {
        (None, None) => None,
        wanted => Some(choose_code(device, wanted)?),
    };
    if code.is_none() && request.size.is_none() && request.stride.is_none() {
        return read_layout(device, &format);
    }
    // Both APIs have these five fields, at different places of the union.
    macro_rules! ask {
        ($pix:expr) => {{
            let pix = $pix;
            pix.pixelformat = code.map_or(pix.pixelformat, |code| code.0);
            (pix.width, pix.height) = request.size.unwrap_or((pix.width, pix.height));
            pix.field = sys::v4l2_field_V4L2_FIELD_ANY;
            pix
        }};
    }
    match device.info().api {
        Api::SinglePlanar => {
            // SAFETY: `type_` is the single-planar type, for which the kernel wrote `pix`; all its fields are integers.
            let pix = ask!(unsafe { &mut format.fmt.pix });
            pix.bytesperline = strides[0];
            pix.sizeimage = 0;
        }
        Api::MultiPlanar => {
            // SAFETY: `type_` is the multi-planar type, for which the kernel wrote `pix_mp`; all its fields are integers. Its
            // fields are at odd addresses (it is packed), so they are only read and written whole.
            let pix = ask!(unsafe { &mut format.fmt.pix_mp });
            let mut planes = pix.plane_fmt;
            for (plane, stride) in planes.iter_mut().zip(strides) {
                plane.bytesperline = *stride;
                plane.sizeimage = 0;
            }
            pix.plane_fmt = planes;
        }
    }
    let check = |reply: &sys::v4l2_format| {
        let layout = read_layout(device, reply)?;
        if let Some(wanted) = request.size.filter(|wanted| *wanted != layout.size()) {
            return Err(lacks_size(device, reply, wanted, layout.size()));
        }
        let given = layout.planes().first().map_or(0, |plane| plane.stride);
        match request.stride.filter(|wanted| exact && *wanted != given) {
            Some(wanted) => Err(lacks_stride(device, wanted, given, &layout)),
            None => Ok(layout),
        }
    };
    // Asked first where the driver can be asked, so that a refusal leaves the format as it was.
    let mut tried = format;
    if (request.size.is_some() || request.stride.is_some()) && raw::try_format(device.as_fd(), &mut tried).is_ok() {
        check(&tried)?;
    }
    raw::set_format(device.as_fd(), &mut format)
        .context("set the format of", || device.name())
        .map_err(|error| Call::SetFormat.explain(error))?;
    check(&format)
}

fn lacks_stride(device: &Device, wanted: u32, given: u32, layout: &Layout) -> Error {
    let (format, (width, height)) = (layout.format(), layout.size());
    let error = Error::new(Kind::Unsupported, "set the stride of", device.name());
    error
        .because(format!("{} has no rows of {wanted} bytes for {format} {width}x{height}", device.info().card))
        .repair(format!("the nearest that it offers is {given}"))
}

fn lacks_size(device: &Device, format: &sys::v4l2_format, wanted: (u32, u32), given: (u32, u32)) -> Error {
    let code = format_code(device.info().api, format);
    let distance = |(width, height): (u32, u32)| width.abs_diff(wanted.0) + height.abs_diff(wanted.1);
    let offered = device.sizes(code).unwrap_or_default();
    let nearest = offered
        .iter()
        .map(|sizes| sizes.nearest(wanted))
        .min_by_key(|&size| distance(size))
        .unwrap_or(given);
    let error = Error::new(Kind::Unsupported, "set the size of", device.name());
    error
        .because(format!("{} has no {}x{} in {code}", device.info().card, wanted.0, wanted.1))
        .repair(format!("the nearest that it offers is {}x{}", nearest.0, nearest.1))
}

/// The V4L2 code to ask for: the one named, else the format's code with the fewest memory planes that the camera offers.
fn choose_code(device: &Device, (code, format): (Option<Fourcc>, Option<Format>)) -> Result<Fourcc> {
    let offers = device.formats()?;
    let fits = |offer: &&FormatOffer| match (code, format) {
        (Some(code), _) => offer.code == code,
        (None, format) => offer.known.map(|(known, _)| known) == format,
    };
    // In the format's own order: the usual code before other names for the same.
    let place = |offer: &&FormatOffer| {
        let (known, planes) = offer.known?;
        Some((planes, known.v4l2().position(|(code, _)| code == offer.code)))
    };
    let best = offers.iter().filter(fits).min_by_key(place);
    best.map(|offer| offer.code).ok_or_else(|| {
        let wanted = code
            .or(format.map(Format::name))
            .map(|code| code.to_string())
            .unwrap_or_default();
        let mut names: Vec<_> = offers
            .iter()
            .map(|offer| match offer.known {
                Some((format, _)) if format.v4l2().next().map(|(code, _)| code) == Some(offer.code) => format.name(),
                _ => offer.code,
            })
            .map(|name| name.to_string())
            .collect();
        names.dedup();
        let error = Error::new(Kind::Unsupported, "set the format of", device.name());
        error
            .because(format!("{} has no {wanted}", device.info().card))
            .repair(format!("it offers {}", names.join(" ")))
    })
}

fn format_code(api: Api, format: &sys::v4l2_format) -> Fourcc {
    // SAFETY: the kernel wrote the member that belongs to the buffer type of `api`; both hold integers alone.
    Fourcc(unsafe {
        match api {
            Api::SinglePlanar => format.fmt.pix.pixelformat,
            Api::MultiPlanar => format.fmt.pix_mp.pixelformat,
        }
    })
}

/// What the numbers of such a format mean.
fn colour(format: Format, colorspace: u32, encoding: u32, quantization: u32) -> Colour {
    match format.kind() {
        Samples::Hsv { .. } => Colour::from_v4l2_hsv(encoding),
        _ => Colour::from_v4l2(colorspace, encoding, quantization),
    }
}

/// The layout that the driver's reply describes: strides are its own, never computed.
fn read_layout(device: &Device, reply: &sys::v4l2_format) -> Result<Layout> {
    let bad = || Error::new(Kind::Unsupported, "use the format of", device.name());
    let code = format_code(device.info().api, reply);
    let unknown = || {
        bad()
            .because(format!("{code} is not a format that dmaflow knows"))
            .repair("ask for another one (`dmaflow list` shows what it offers)")
    };
    let (format, memory_planes) = Format::from_v4l2(code).ok_or_else(unknown)?;
    let (size, strides, colour, field) = match device.info().api {
        Api::SinglePlanar => {
            // SAFETY: the reply is of the single-planar type, for which the kernel wrote `pix`; all fields are integers.
            let pix = unsafe { reply.fmt.pix };
            // SAFETY: both members of the inner union are the same integer.
            let encoding = unsafe { pix.__bindgen_anon_1.ycbcr_enc };
            let colour = colour(format, pix.colorspace, encoding, pix.quantization);
            ((pix.width, pix.height), vec![pix.bytesperline], colour, pix.field)
        }
        Api::MultiPlanar => {
            // SAFETY: the reply is of the multi-planar type, for which the kernel wrote `pix_mp`; all fields are integers.
            let pix = unsafe { reply.fmt.pix_mp };
            // SAFETY: both members of the inner union are the same integer.
            let encoding = unsafe { pix.__bindgen_anon_1.ycbcr_enc };
            let colour = colour(format, pix.colorspace, u32::from(encoding), u32::from(pix.quantization));
            let planes = pix.plane_fmt;
            let strides = planes
                .iter()
                .take(usize::from(pix.num_planes))
                .map(|plane| plane.bytesperline)
                .collect();
            ((pix.width, pix.height), strides, colour, pix.field)
        }
    };
    // Whole pictures only, progressive or with the lines of both fields in turn; the other orders have a field, or one below the other.
    const WHOLE: [u32; 4] = [
        sys::v4l2_field_V4L2_FIELD_NONE,
        sys::v4l2_field_V4L2_FIELD_INTERLACED,
        sys::v4l2_field_V4L2_FIELD_INTERLACED_TB,
        sys::v4l2_field_V4L2_FIELD_INTERLACED_BT,
    ];
    if !WHOLE.contains(&field) {
        return Err(bad()
            .because("it delivers fields and not whole pictures")
            .repair("choose another input or size"));
    }
    let layout = match strides.as_slice() {
        &[stride] if memory_planes == 1 => Layout::contiguous(format, size, stride),
        strides => Layout::separate(format, size, strides),
    };
    let layout = layout.map_err(|cause| bad().because(cause))?;
    Ok(layout.with_colour(colour))
}

/// Sets the rate, if one is asked for, and reads the driver's reply.
pub(super) fn agree_rate(device: &Device, request: RateRequest, layout: &Layout) -> Result<Option<Rate>> {
    let mut parameters: sys::v4l2_streamparm = raw::zeroed();
    parameters.type_ = device.info().api.buffer_type();
    let known = raw::get_parameters(device.as_fd(), &mut parameters).is_ok();
    let code = format_code(device.info().api, &current_format(device)?);
    let offered = || device.rates(code, layout.size()).unwrap_or_default();
    let fps = match request {
        RateRequest::AsItIs => None,
        RateRequest::Exactly(fps) => Some(fps),
        RateRequest::FastestUpTo(limit) => {
            let not_above = |rates: Rates| rates.nearest(limit).filter(|&fps| fps <= limit * (1.0 + SAME_RATE));
            offered().into_iter().filter_map(not_above).max_by(f64::total_cmp)
        }
    };
    let Some(fps) = fps else {
        return Ok(known.then(|| read_rate(&parameters)));
    };
    let subject = || format!("the rate of {}", device.name());
    // A rate that nobody asked for is no reason to fail.
    let strict = matches!(request, RateRequest::Exactly(_));
    if !known && !strict {
        return Ok(None);
    }
    if !known {
        return Err(Error::new(Kind::Unsupported, "set", subject()).because("the driver has no rates"));
    }
    let same = |given: f64| (given - fps).abs() <= fps * SAME_RATE;
    let distance = |offer: &f64| (offer - fps).abs();
    let nearest = offered().into_iter().filter_map(|rates| rates.nearest(fps));
    let nearest = nearest.min_by(|a, b| distance(a).total_cmp(&distance(b)));
    let lacks = |nearest: f64| {
        let (width, height) = layout.size();
        let because = format!("{} has no {fps} frames a second at {width}x{height}", device.info().card);
        let repair = format!("the nearest that it offers is {}", (nearest * 1000.0).round() / 1000.0);
        Error::new(Kind::Unsupported, "set", subject()).because(because).repair(repair)
    };
    // Refused before it is set, where the camera tells what it offers, so that a refusal leaves the rate as it was.
    if let Some(nearest) = nearest.filter(|&nearest| strict && !same(nearest)) {
        return Err(lacks(nearest));
    }
    let wanted = Rate::from_fps(fps);
    // SAFETY: the type is a capture type, for which `capture` is the member; all its fields are integers.
    let capture = unsafe { &mut parameters.parm.capture };
    capture.timeperframe = sys::v4l2_fract { numerator: wanted.numerator, denominator: wanted.denominator };
    let set = raw::set_parameters(device.as_fd(), &mut parameters).context("set", subject);
    let given = read_rate(&parameters);
    if !strict {
        return Ok(set.is_ok().then_some(given));
    }
    set?;
    if given.fps().is_some_and(same) {
        return Ok(Some(given));
    }
    Err(lacks(nearest.or(given.fps()).unwrap_or(0.0)))
}

fn read_rate(parameters: &sys::v4l2_streamparm) -> Rate {
    // SAFETY: the type is a capture type, for which `capture` is the member; all its fields are integers.
    let per_frame = unsafe { parameters.parm.capture.timeperframe };
    Rate { numerator: per_frame.numerator, denominator: per_frame.denominator }
}
