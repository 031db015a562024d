//! Sources that can be probed: cameras, and the test card.

use std::path::{Path, PathBuf};

use super::{Candidate, Offer};
use crate::endpoint::Source;
use crate::error::{Kind, Result};
use crate::format::{Format, Fourcc};
use crate::pattern::{Pattern, PatternRequest};
use crate::v4l2::{Camera, CameraRequest, Device, RateRequest, SavedFormat};

/// The rate above which most displays show no more.
const USUAL_RATE: f64 = 60.0;

/// A camera in each of its formats. What it was set to is put back by [`restore`](CameraFormats::restore), or by dropping it.
#[derive(Debug)]
pub struct CameraFormats {
    path: PathBuf,
    name: String,
    size: Option<(u32, u32)>,
    device: Device,
    saved: SavedFormat,
    /// Whether its format may be another than before.
    touched: bool,
}

impl CameraFormats {
    /// Notes what the camera is set to. `size` in pixels, else the one that it has, or in each format the nearest to that.
    ///
    /// # Errors
    /// What `VIDIOC_G_FMT` says.
    pub fn new(device: Device, size: Option<(u32, u32)>) -> Result<CameraFormats> {
        let saved = device.save_format()?;
        Ok(CameraFormats { path: device.info().path.clone(), name: device.name(), size, device, saved, touched: false })
    }

    /// The camera.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Sets the camera to what it was. No source of it may be open.
    ///
    /// # Errors
    /// As [`Device::restore_format`].
    pub fn restore(&mut self) -> Result<()> {
        if std::mem::take(&mut self.touched) { self.device.restore_format(&self.saved) } else { Ok(()) }
    }

    /// The offered size nearest to the one that the camera had.
    fn nearest_size(&self, code: Option<Fourcc>) -> Option<(u32, u32)> {
        let had = self.saved.size();
        let distance =
            |(width, height): (u32, u32)| u64::from(width.abs_diff(had.0)) + u64::from(height.abs_diff(had.1));
        let offered = self.device.sizes(code?).ok()?;
        let nearest = offered.into_iter().map(|sizes| sizes.nearest(had));
        nearest.min_by_key(|&size| distance(size))
    }
}

impl Candidate for CameraFormats {
    fn name(&self) -> &str {
        &self.name
    }

    fn offers(&self) -> Result<Vec<Offer>> {
        let mut offers: Vec<Offer> = Vec::new();
        let place = |offer: &Offer| offer.format.v4l2().position(|(code, _)| Some(code) == offer.code);
        for offered in self.device.formats()? {
            let Some((format, memory_planes)) = offered.known else { continue };
            let new = Offer { format, memory_planes, code: Some(offered.code) };
            // Several codes of V4L2's may be one format here: the usual one is asked for.
            let same = |offer: &&mut Offer| (offer.format, offer.memory_planes) == (format, memory_planes);
            match offers.iter_mut().find(same) {
                Some(known) if place(&new) < place(known) => *known = new,
                Some(_) => {}
                None => offers.push(new),
            }
        }
        Ok(offers)
    }

    fn open(&mut self, offer: &Offer) -> Result<Box<dyn Source>> {
        let size = self.size.or_else(|| self.nearest_size(offer.code));
        let request = CameraRequest {
            format: Some(offer.format),
            code: offer.code,
            size,
            rate: RateRequest::FastestUpTo(USUAL_RATE),
            ..CameraRequest::default()
        };
        let camera = Camera::open(Device::open(Path::new(&self.path))?, &request);
        // A camera of which another program has buffers keeps its format.
        self.touched |= !camera.as_ref().is_err_and(|error| error.kind() == Kind::Busy);
        Ok(Box::new(camera?))
    }
}

impl Drop for CameraFormats {
    fn drop(&mut self) {
        // Nobody can act on a failure here; `restore` is for those who want to know.
        let _ = self.restore();
    }
}

/// The test card in each format.
#[derive(Clone, Copy, Debug, Default)]
pub struct PatternFormats {
    /// In pixels, else the usual one.
    pub size: Option<(u32, u32)>,
}

impl Candidate for PatternFormats {
    fn name(&self) -> &str {
        "pattern"
    }

    fn offers(&self) -> Result<Vec<Offer>> {
        Ok(Format::all()
            .map(|format| Offer { format, memory_planes: 1, code: None })
            .collect())
    }

    fn open(&mut self, offer: &Offer) -> Result<Box<dyn Source>> {
        let default = PatternRequest::default();
        let size = self.size.unwrap_or(default.size);
        Ok(Box::new(Pattern::new(&PatternRequest { format: Some(offer.format), size, ..default })?))
    }
}
