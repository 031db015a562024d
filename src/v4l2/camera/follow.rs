//! A camera whose signal has changed: locked to again, and set to what was asked for as far as the new picture allows it.

use super::*;

/// A signal that has changed again each time that it was locked to is left to the events that tell so.
const MAX_LOCKS: u32 = 4;

/// Locks to the signal that is there now, and has later changes told.
pub(super) fn lock(device: &Device) -> Result<()> {
    device.subscribe();
    // Several events may tell of one change, and setting the timings makes another. What is read away here is told by the question
    // after it; a change that comes later has an event of its own.
    for _ in 0..MAX_LOCKS {
        while device.event()?.is_some() {}
        if !device.lock_to_signal()? {
            break;
        }
    }
    Ok(())
}

impl Camera {
    /// Agrees on what was asked for as far as the new picture allows it: the code, then the format alone, then what the driver has;
    /// with that, the stride and the rate. The size is the source's own.
    pub(super) fn agree_again(&mut self) -> Result<(Layout, Option<Rate>)> {
        let CameraRequest { code, size, stride, rate, .. } = self.request;
        self.not_kept.clear();
        // Some drivers fall back to a format of their own when the timings are set.
        let before = self.layout.format();
        let mut keep = CameraRequest { format: Some(before), code, ..CameraRequest::default() };
        let mut layout = self.agree_if_offered(&keep)?;
        if layout.is_none()
            && let Some(code) = keep.code.take()
        {
            self.not_kept.push(format!("the code {code}"));
            layout = self.agree_if_offered(&keep)?;
        }
        let mut layout = match layout {
            Some(layout) => layout,
            None => {
                self.not_kept.push(format!("the format {before}"));
                keep.format = None;
                agree_format(&self.device, &keep)?
            }
        };
        if let Some(stride) = stride {
            let wished = CameraRequest { stride: Some(stride), ..keep };
            match self.agree_if_offered(&wished)? {
                Some(agreed) => layout = agreed,
                None => self.not_kept.push(format!("the stride of {stride} bytes")),
            }
        }
        if let Some((width, height)) = size.filter(|size| *size != layout.size()) {
            self.not_kept.push(format!("the size {width}x{height}"));
        }
        let agreed = match (agree_rate(&self.device, rate, &layout), rate) {
            (Err(error), RateRequest::Exactly(fps)) if error.kind() == Kind::Unsupported => {
                self.not_kept.push(format!("the rate of {fps} frames a second"));
                agree_rate(&self.device, RateRequest::AsItIs, &layout)?
            }
            (agreed, _) => agreed?,
        };
        Ok((layout, agreed))
    }

    /// `None` for what the driver lacks.
    fn agree_if_offered(&self, request: &CameraRequest) -> Result<Option<Layout>> {
        match agree_format(&self.device, request) {
            Err(error) if error.kind() == Kind::Unsupported => Ok(None),
            other => other.map(Some),
        }
    }
}
